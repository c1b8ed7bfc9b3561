"""A draw in batches of one size: how many samples there are, which rows a batch has, and where."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree


def number(where: str, num: int | None, **given: PyTree) -> int:
    """The number of samples, after checking that all that is given agrees on it; 1 if nothing is.

    Args:
      where: who asks, for messages.
      num: as the user says; None to take it from the arrays.
      **given: trees of `[num, ...]` arrays, or None.

    Raises:
      UserError: lengths that disagree, or an entry without a sample axis.
    """
    lengths = {}
    if num is not None:
        lengths["num"] = num
    for name, tree in given.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            entry = name + jax.tree_util.keystr(path)
            if not jnp.ndim(leaf):
                raise UserError(
                    f"{where}: {entry} is a scalar; give one entry a sample, [num, ...]."
                )
            lengths[entry] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{k} has {v}" for k, v in lengths.items())
        raise UserError(f"{where}: lengths disagree: {told}.")
    return next(iter(lengths.values()), 1)


def pieces(
    tree: PyTree, num: int, batch: int, sharding: jax.sharding.Sharding | None
) -> Iterator[tuple[int, PyTree]]:
    """(how many rows count, those rows of the tree) of each batch; the last one is padded.

    Args:
      tree: of `[num, ...]` arrays.
      batch: rows at a time, at most num; made a multiple of the devices that `sharding` has.
      sharding: how the rows of a batch are laid out over devices.
    """
    if sharding is not None:
        parts = _parts(sharding)
        batch = -(-batch // parts) * parts
    for start in range(0, num, batch):
        take = np.minimum(np.arange(start, start + batch), num - 1)
        pick = lambda a, take=take: a if batch == num else jnp.asarray(a)[take]
        rows = jax.tree.map(pick, tree)
        if sharding is not None:
            rows = jax.tree.map(lambda a: _laid_out(a, sharding), rows)
        yield min(batch, num - start), rows


def _parts(sharding: jax.sharding.Sharding) -> int:
    """Into how many parts it cuts the first dimension."""
    count = len(sharding.device_set)
    return count // sharding.shard_shape((count,))[0]


def _laid_out(a: Array, sharding: jax.sharding.Sharding) -> Array:
    if sharding.is_fully_addressable or not getattr(a, "is_fully_addressable", True):
        return jax.device_put(a, sharding)
    a = np.asarray(a)  # the same in every process
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
