"""Sequences of tokens that are split over devices: held so, joined, filled up, refused.

Joining two split sequences end to end would move nearly all tokens to other devices. Attention does
not care for their order, so each device joins its own parts: text 1, image 1, text 2, image 2, ...
With whole sequences it is a plain concatenation.
"""

import math

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.parallel import layout
from jdiff.parallel.shards import nearest
from jdiff.pytree import Array


def parts(name: str | None = "tokens") -> int:
    """Over how many devices the network that is being traced splits an axis of that name."""
    current = layout.current()
    if current is None:
        return 1
    return math.prod(current.mesh.shape[axis] for axis in dict(current.rules).get(name, ()))


def hold(h: Array) -> Array:
    """h `[B, N, ...]` or `[B, rows, ...]`, its tokens split over devices, its channels whole.

    Raises:
      UserError: tokens that do not divide.
    """
    check(h.shape[1], "tokens" if h.ndim < 4 else "rows of tokens")
    return layout.constrain(h, "batch", "tokens", *(None,) * (h.ndim - 2))


def check(count: int, what: str) -> None:
    """Raises a UserError with the nearest numbers that fit, unless `count` divides."""
    size = parts()
    if count % size:
        raise UserError(
            f"mesh.sequence={size}: {count} {what} do not divide over {size} devices; "
            f"{nearest(count, size)}."
        )


def join(*sequences: Array) -> Array:
    """`[B, N_i, ...]` as one sequence, each device's parts of them side by side."""
    size = parts()
    cut = [a.reshape(len(a), size, -1, *a.shape[2:]) for a in sequences]
    joined = jnp.concatenate(cut, axis=2)
    return joined.reshape(len(joined), -1, *joined.shape[3:])


def part(h: Array, length: int) -> tuple[Array, Array]:
    """The inverse of `join` of two: the first `length` tokens, and the others."""
    size = parts()
    cut = h.reshape(len(h), size, -1, *h.shape[2:])
    pair = cut[:, :, : length // size], cut[:, :, length // size :]
    return tuple(a.reshape(len(h), -1, *h.shape[2:]) for a in pair)


def fill(tokens: Array, seen: Array | None = None) -> tuple[Array, Array | None]:
    """tokens `[B, L, C]` with zeros behind so that they divide, and which of them are to be seen.

    Args:
      seen: bool `[B, L]`, None for all.

    Returns:
      tokens `[B, L', C]`, and bool `[B, L']`, or None if all are seen.
    """
    more = -tokens.shape[1] % parts()
    if not more:
        return tokens, seen
    seen = jnp.ones(tokens.shape[:2], bool) if seen is None else seen
    return jnp.pad(tokens, [(0, 0), (0, more), (0, 0)]), jnp.pad(seen, [(0, 0), (0, more)])


def mask(*seen: Array | int) -> Array | None:
    """Where the queries of a joined sequence may look, bool `[B, 1, 1, N]`; None: everywhere.

    Args:
      seen: which tokens of each sequence are to be seen, bool `[B, L]`, or its length: all.
    """
    given = [a for a in seen if not isinstance(a, int)]
    if not given:
        return None
    rows = len(given[0])
    every = [jnp.ones((rows, a), bool) if isinstance(a, int) else a for a in seen]
    return join(*every)[:, None, None]
