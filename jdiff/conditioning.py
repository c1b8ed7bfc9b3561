"""Conditions and their null: one rule for guidance and for the dropping of labels in training.

`null` holds, for the entries of `cond` that guidance switches off, the value that stands for "no
condition": a number or an array that broadcasts to the entry, e.g. {"label": 10}. Entries of `cond`
that `null` does not name (a low-resolution image, say) are kept.
"""

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.pytree import Array, PyTree, expand


def with_null(cond: dict[str, PyTree], null: dict[str, PyTree]) -> dict[str, PyTree]:
    """`cond` with the entries that `null` names replaced by their null value.

    Raises:
      UserError: `null` names an entry that `cond` does not have, or does not broadcast to it.
    """
    for name in null:
        choose("null entry", name, cond)
    return {k: _fill(k, v, null[k]) if k in null else v for k, v in cond.items()}


def drop(
    key: Array, cond: dict[str, PyTree], null: dict[str, PyTree], rate: float
) -> dict[str, PyTree]:
    """`cond` with each sample's condition replaced by the null with probability `rate`.

    All entries that `null` names are dropped together, sample by sample (Ho and Salimans 2022).
    """
    without = with_null(cond, null)
    dropped = jax.random.bernoulli(key, rate, (jax.tree.leaves(cond)[0].shape[0],))
    return jax.tree.map(lambda a, b: jnp.where(expand(dropped, a), b, a), cond, without)


def _fill(name: str, value: PyTree, null: PyTree) -> PyTree:
    def one(v: Array, n: Array) -> Array:
        v = jnp.asarray(v)
        n = jnp.asarray(n, v.dtype)
        if n.ndim > v.ndim or any(a not in (1, b) for a, b in zip(n.shape[::-1], v.shape[::-1])):
            raise UserError(
                f"null[{name!r}] of shape {n.shape} does not broadcast to cond[{name!r}] {v.shape}."
            )
        return jnp.broadcast_to(n, v.shape)

    return jax.tree.map(one, value, null)
