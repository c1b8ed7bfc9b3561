"""Conditions and their null: one rule for guidance and for the dropping of labels in training.

`null` holds, for the entries of `cond` that guidance switches off, the value that stands for "no
condition": a number or an array that broadcasts to the entry, e.g. {"label": 10}. Entries of `cond`
that `null` does not name (a low-resolution image, say) are kept.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.pytree import Array, PyTree, expand

#: Where a network that learns its null holds it: `params[LEARNED]["text"]`.
LEARNED = "null_condition"


def with_null(cond: dict[str, PyTree], null: dict[str, PyTree]) -> dict[str, PyTree]:
    """`cond` with the entries that `null` names replaced by their null value.

    Raises:
      UserError: `null` names an entry that `cond` does not have, or does not broadcast to it.
    """
    for name in null:
        choose("null entry", name, cond)
    return {k: _fill(k, v, null[k]) if k in null else v for k, v in cond.items()}


def floats(cond: Mapping[str, Array]) -> dict[str, Array]:
    """`cond` with its floats, of whatever precision they are kept in, as float32."""
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    return {name: a.astype("float32") if is_float(a) else a for name, a in cond.items()}


def drop(
    key: Array, cond: dict[str, PyTree], null: dict[str, PyTree],
    rate: float | Mapping[tuple[str, ...], float],
) -> dict[str, PyTree]:  # fmt: skip
    """`cond` with each sample's condition replaced by the null with probability `rate`.

    All entries that `null` names are dropped together, sample by sample (Ho and Salimans 2022).

    Args:
      rate: one for all of them; or one for each group of entries {("text", "text_mask"): 0.1}:
        a group is dropped together, and without regard to the others.
    """
    without, size = with_null(cond, null), jax.tree.leaves(cond)[0].shape[0]
    groups = {tuple(cond): rate} if not isinstance(rate, Mapping) else rate
    keys = jax.random.split(key, len(groups)) if len(groups) > 1 else [key]
    found = dict(cond)
    for key, (names, share) in zip(keys, groups.items()):
        dropped = jax.random.bernoulli(key, share, (size,))
        for name in names:
            found[name] = jax.tree.map(
                lambda a, b, dropped=dropped: jnp.where(expand(dropped, a), b, a),
                cond[name], without[name],
            )  # fmt: skip
    return found


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
