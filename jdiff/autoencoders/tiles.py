"""Working through a big image tile by tile: memory that does not grow with the image.

Tiles overlap, and where they do the result is blended from one into the next. Tiles begin at every
(size - overlap)th latent; those at the right and bottom end where the image ends, so they may be
smaller. Each sees only itself, so the result is not quite that of the whole image, whose
normalisations and attention see all of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Tile:
    """How an image is cut: square tiles of `size` pixels whose neighbours share `overlap`."""

    size: int
    overlap: int


def tile(size: int, overlap: int | None, factor: int) -> Tile:
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
    return Tile(size, overlap)


class _Span(NamedTuple):
    """One tile's part of an axis: its first latent, how many, and the weights of its results."""

    start: int
    length: int
    weight: np.ndarray  # [length * put]: rises from 0 where it follows another, falls to 0
    squared: np.ndarray  # the same with the rise squared
    falling: np.ndarray  # bool: shared with the next tile


def _spans(count: int, size: int, overlap: int, put: int) -> list[_Span]:
    starts = range(0, count, size - overlap)
    lengths = [min(size, count - start) for start in starts]
    # What a tile shares with the one before it: less than `overlap` where it is shorter.
    shared = [0] + [min(overlap, length) * put for length in lengths[1:]] + [0]
    spans = []
    for n, (start, length) in enumerate(zip(starts, lengths)):
        rise, fall = (np.arange(shared[k]) / max(1, shared[k]) for k in (n, n + 1))
        flat = np.ones(length * put - len(rise) - len(fall))
        weights = [np.concatenate([rise**p, flat, 1 - fall**p]) for p in (1, 2)]
        falling = np.arange(length * put) >= length * put - len(fall)
        spans.append(_Span(start, length, *weights, falling))
    return spans


def through(
    fn: Callable[[Array], PyTree], x: Array, tile: Tile, *, factor: int, cut: int, put: int
) -> PyTree:
    """fn(x), a tile of x at a time, the results blended.

    The weights are those of diffusers: a result is blended with the finished one above it, then
    with the finished one on its left. The one above was itself blended with its left neighbour, so
    that where four tiles meet the upper two share their part by the square of the horizontal ramp.

    Args:
      fn: of [B, h, w, C]; a tree of arrays [B, h put / cut, w put / cut, C'].
      x: [B, H, W, C].
      tile: in pixels.
      factor: pixels a latent.
      cut: what of x is one latent: `factor` of an image, 1 of latents.
      put: what of the result is one latent.
    """
    size, overlap = tile.size // factor, tile.overlap // factor
    axes = [_spans(side // cut, size, overlap, put) for side in x.shape[1:3]]
    groups: dict[tuple[int, int], list[tuple[_Span, _Span]]] = {}
    for rows in axes[0]:
        for columns in axes[1]:
            groups.setdefault((rows.length, columns.length), []).append((rows, columns))

    def one(shape: tuple[int, int], canvas: PyTree, given: tuple) -> tuple[PyTree, None]:
        (row, column), rows, falling, columns, squared = given
        piece = (x.shape[0], shape[0] * cut, shape[1] * cut, x.shape[3])
        results = fn(jax.lax.dynamic_slice(x, (0, row * cut, column * cut, 0), piece))
        weight = rows[:, None] * jnp.where(falling[:, None], squared, columns)

        def add(whole: Array, part: Array) -> Array:
            corner = (0, row * put, column * put, 0)
            there = jax.lax.dynamic_slice(whole, corner, part.shape)
            part = there + weight[:, :, None].astype(whole.dtype) * part
            return jax.lax.dynamic_update_slice(whole, part, corner)

        return jax.tree.map(add, canvas, results), None

    some = jax.ShapeDtypeStruct((x.shape[0], size * cut, size * cut, x.shape[3]), x.dtype)
    grid = tuple(side // cut * put for side in x.shape[1:3])
    canvas = jax.tree.map(
        lambda a: jnp.zeros((x.shape[0], *grid, a.shape[3]), a.dtype), jax.eval_shape(fn, some)
    )
    # The canvas goes from one group of equal tiles to the next: no two are in memory at a time.
    for shape, tiles in groups.items():
        given = (
            np.asarray([(rows.start, columns.start) for rows, columns in tiles]),
            np.stack([rows.weight for rows, _ in tiles]),
            np.stack([rows.falling for rows, _ in tiles]),
            np.stack([columns.weight for _, columns in tiles]),
            np.stack([columns.squared for _, columns in tiles]),
        )
        canvas, _ = jax.lax.scan(functools.partial(one, shape), canvas, given)
    return canvas


def by_rows(fn: Callable[[Array], PyTree], x: Array, rows: int | None) -> PyTree:
    """fn(x), `rows` of the batch at a time; all at once if that is None or covers the batch.

    The members of one go lie evenly over the batch, so that those of a sharded one are on all
    devices. Where `rows` does not divide the batch it is filled up with its first member.
    """
    count = x.shape[0]
    if rows is None or rows >= count:
        return fn(x)
    goes = -(-count // rows)
    if fill := rows * goes - count:
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (fill, *x.shape[1:]))])
    found = jax.lax.map(fn, jnp.swapaxes(x.reshape(rows, goes, *x.shape[1:]), 0, 1))

    def join(a: Array) -> Array:
        return jnp.swapaxes(a, 0, 1).reshape(rows * goes, *a.shape[2:])[:count]

    return jax.tree.map(join, found)
