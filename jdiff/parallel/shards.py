"""How the arrays of one attention lie on the devices, for kernels that see each device's part."""

import dataclasses
import math

import jax

from jdiff.errors import UserError
from jdiff.parallel.layout import Layout
from jdiff.pytree import Array

P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class Shards:
    """Which mesh axes each dimension of q, k and v `[B, N, heads, D]` is split over.

    Attributes:
      rows, heads: those of the batch and of the heads; none, if they do not divide.
      tokens: those of queries and of keys.
    """

    mesh: jax.sharding.Mesh
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def count(self) -> int:
        """Over how many devices tokens are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.tokens)

    @property
    def over_heads(self) -> int:
        """Over how many devices heads are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.heads)

    @property
    def places(self) -> P:
        """Of q, k, v and what attention returns."""
        return P(self.rows, self.tokens, self.heads)

    @property
    def numbers(self) -> P:
        """Of one number a query, `[B, heads, N]`."""
        return P(self.rows, self.heads, self.tokens)

    def mask(self, mask: Array | None) -> P | None:
        """Of a mask: queries and heads as q's, the places to look at whole on each device."""
        if mask is None:
            return None
        names = (self.rows, self.heads, self.tokens, None)
        return P(*(name if size > 1 else None for name, size in zip(names, mask.shape)))


def shards(layout: Layout, kind: str, q: Array, k: Array) -> Shards:
    """Of queries and keys `[B, N, heads, D]`.

    Raises:
      UserError: tokens that do not divide over the devices, with the nearest number that does.
    """
    split = [*layout.spec(("batch", None, "heads", None), q.shape), None, None, None]
    rows, _, heads, *_ = ((a,) if isinstance(a, str) else a or () for a in split)
    wanted = dict(layout.rules).get("tokens", ())
    tokens = tuple(axis for axis in wanted if layout.mesh.shape[axis] > 1)
    laid = Shards(layout.mesh, rows, tokens, heads)
    for what, length in {"queries": q.shape[1], "keys": k.shape[1]}.items():
        if length % laid.count:
            raise UserError(
                f"attention {kind!r}: {length} {what} do not divide over {laid.count} devices "
                f"(mesh.{', mesh.'.join(tokens)}); {nearest(length, laid.count)}."
            )
    return laid


def nearest(count: int, size: int) -> str:
    """Which numbers next to `count` divide by `size`, in words."""
    near = sorted({count // size * size, -(-count // size) * size} - {0})
    return " and ".join(map(str, near)) + (" do" if len(near) > 1 else " does")
