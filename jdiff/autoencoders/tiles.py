"""Working through a big image tile by tile: memory that does not grow with the image.

Tiles overlap, and where they do the result is blended from one into the next. Tiles begin at every
(size - overlap)th latent; those at the right and bottom end where the image ends, so they may be
smaller. Each sees only itself, so the result is not quite that of the whole image, whose
normalisations and attention see all of it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree

View = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Tile:
    """How an image is cut: square tiles of `size` pixels whose neighbours share `overlap`.

    They are put together by `blend`, a name in `BLENDS`.
    """

    size: int
    overlap: int
    blend: str = "in_turn"


def tile(size: int, overlap: int | None, factor: int, blend: str = "in_turn") -> Tile:
    """A checked `Tile` of an autoencoder with that factor; the overlap is a quarter if not given.

    Raises:
      UserError: sizes that the factor does not divide, or an overlap above half of a tile.
    """
    if overlap is None:
        overlap = factor * round(size / 4 / factor)
    for name, given, least in (("size", size, factor), ("overlap", overlap, 0)):
        if given < least or given % factor:
            nearest = max(least, factor * round(given / factor))
            raise UserError(
                f"tiled: {name}={given} must be a multiple of the autoencoder's factor {factor}, "
                f"at least {least}; the nearest is {nearest}."
            )
    if 2 * overlap > size:
        raise UserError(
            f"tiled: overlap={overlap} is more than half of size={size}; at most "
            f"{size // 2 // factor * factor}."
        )
    return Tile(size, overlap, blend)


class _Span(NamedTuple):
    """One tile's part of an axis, in latents: the first, how many, how many it shares."""

    start: int
    length: int
    before: int  # shared with the tile before it
    after: int  # shared with the next


def _spans(count: int, size: int, overlap: int) -> list[_Span]:
    starts = range(0, count, size - overlap)
    lengths = [min(size, count - start) for start in starts]
    # A tile that is shorter than the overlap lies in the one before it.
    shared = [0, *(min(overlap, length) for length in lengths[1:]), 0]
    return [_Span(*span) for span in zip(starts, lengths, shared, shared[1:])]


def _groups(
    sides: Sequence[int], size: int, overlap: int
) -> dict[tuple[int, int], list[tuple[_Span, _Span]]]:
    """The tiles of a grid of latents by their shapes: one loop, one program, a shape."""
    rows, columns = (_spans(side, size, overlap) for side in sides)
    groups: dict[tuple[int, int], list[tuple[_Span, _Span]]] = {}
    for row, column in itertools.product(rows, columns):
        groups.setdefault((row.length, column.length), []).append((row, column))
    return groups


def through(
    fn: Callable[[Array], PyTree],
    x: Array,
    tile: Tile,
    rows: int,
    *,
    factor: int,
    cut: int,
    put: int,
) -> PyTree:
    """fn(x), a tile of `rows` images at a time, the results blended.

    Each result is added, weighed, to where it belongs: beside the whole there is one tile in
    memory.

    Args:
      fn: of [B, h, w, C]; a tree of arrays [B, h put / cut, w put / cut, C'].
      x: [B, H, W, C].
      tile: in pixels.
      rows: how many of the batch at a time.
      factor: pixels a latent.
      cut: what of x is one latent: `factor` of an image, 1 of latents.
      put: what of the result is one latent.
    """
    grid = [side // cut for side in x.shape[1:3]]
    size, overlap = tile.size // factor, tile.overlap // factor
    blend = functools.partial(BLENDS[tile.blend], overlap=overlap * put)
    split, join = _batch(x.shape[0], rows)
    x = split(x)
    some = (x.shape[0], size * cut, size * cut, x.shape[4])
    canvas = jax.tree.map(
        lambda a: jnp.zeros((*x.shape[:2], *(side * put for side in grid), a.shape[3]), a.dtype),
        jax.eval_shape(fn, jax.ShapeDtypeStruct(some, x.dtype)),
    )

    def one(shape: tuple[int, int], go: Array, canvas: PyTree, span: Array) -> tuple[PyTree, None]:
        (row, *vertical), (column, *horizontal) = span
        weight = blend(*(n * put for n in shape), *(put * n for n in vertical + horizontal))
        piece = (x.shape[0], 1, shape[0] * cut, shape[1] * cut, x.shape[4])
        results = fn(jax.lax.dynamic_slice(x, (0, go, row * cut, column * cut, 0), piece)[:, 0])

        def add(whole: Array, part: Array) -> Array:
            corner = (0, go, row * put, column * put, 0)
            part = weight[:, :, None].astype(part.dtype) * part
            there = jax.lax.dynamic_slice(whole, corner, (len(part), 1, *part.shape[1:]))
            return jax.lax.dynamic_update_slice(whole, there + part[:, None], corner)

        return jax.tree.map(add, canvas, results), None

    # The canvas goes from one group of equal tiles to the next: no two are in memory at a time.
    for shape, tiles in _groups(grid, size, overlap).items():
        given = np.asarray([[(s.start, s.before, s.after) for s in pair] for pair in tiles])

        def all_tiles(
            canvas: PyTree, go: Array, shape: tuple = shape, given: np.ndarray = given
        ) -> tuple[PyTree, None]:
            return jax.lax.scan(functools.partial(one, shape, go), canvas, given)

        canvas, _ = jax.lax.scan(all_tiles, canvas, jnp.arange(x.shape[1]))
    return jax.tree.map(join, canvas)


def in_turn(
    height: int, width: int, above: Array, below: Array, left: Array, right: Array, *, overlap: int
) -> Array:
    """The share [height, width] of a tile in the whole, as in diffusers; the others' make up one.

    A result is blended with the finished one above it, then with the finished one on its left. The
    one above was itself blended with its left neighbour by then, so where four tiles meet the upper
    two share by the square of the horizontal ramp.

    Args:
      height, width: of the tile.
      above, below, left, right: how many places it shares with the neighbour on that side.
      overlap: those that whole tiles share.
    """
    rise, fall = _ramps(height, above, below, jnp.maximum(above, 1), jnp.maximum(below, 1))
    vertical = (rise * (1 - fall))[:, None]
    upper = jnp.arange(height)[:, None] >= height - below
    rise, fall = _ramps(width, left, right, jnp.maximum(left, 1), jnp.maximum(right, 1))
    return vertical * jnp.where(upper, rise**2 * (1 - fall**2), rise * (1 - fall))


def covering(
    height: int, width: int, above: Array, below: Array, left: Array, right: Array, *, overlap: int
) -> Array:
    """The share of a tile as in diffusers' AutoencoderTiny; arguments as of `in_turn`.

    Each tile covers those before it with a mask, the product of two ramps that reach one at the
    last place that is shared. Its share is its mask times what the four after it leave.
    """
    reach = max(1, overlap - 1)
    rise, fall = _ramps(height, above, below, reach, reach)
    top, bottom = rise[:, None], fall[:, None]
    start, end = _ramps(width, left, right, reach, reach)
    shared = jnp.arange(width) < left  # also with the tile below the one on the left
    share = top * start * (1 - top * end)
    return share * (1 - bottom * shared) * (1 - bottom * start) * (1 - bottom * end)


#: How tiles are put together, by name: a network's attribute `blend`.
BLENDS: Mapping[str, Callable[..., Array]] = {"in_turn": in_turn, "covering": covering}


def _ramps(
    length: int, before: Array, after: Array, up: Array | int, down: Array | int
) -> tuple[Array, Array]:
    """A tile's rise over what it shares with the one before, and the next one's over its end.

    By 1 / up and 1 / down a place; 1 and 0 elsewhere.
    """
    place = jnp.arange(length, dtype=float)
    rise = jnp.where(place < before, jnp.minimum(place / up, 1.0), 1.0)
    return rise, jnp.clip((place - (length - after)) / down, 0.0, 1.0)


def by_rows(fn: Callable[[Array], PyTree], x: Array, rows: int) -> PyTree:
    """fn(x), `rows` of the batch at a time."""
    if rows >= x.shape[0]:
        return fn(x)
    split, join = _batch(x.shape[0], rows)
    found = jax.lax.map(fn, jnp.swapaxes(split(x), 0, 1))
    return jax.tree.map(lambda a: join(jnp.swapaxes(a, 0, 1)), found)


def _batch(count: int, rows: int) -> tuple[View, View]:
    """[B, ...] to [rows, goes, ...], and back.

    The members of one go lie evenly over the batch, so that those of a sharded one are on all
    devices. Where `rows` does not divide the batch it is filled up with its first member.
    """
    rows = min(rows, count)
    goes = -(-count // rows)
    fill = rows * goes - count

    def split(x: Array) -> Array:
        if fill:
            x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (fill, *x.shape[1:]))])
        return x.reshape(rows, goes, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(rows * goes, *x.shape[2:])[:count]

    return split, join
