"""Resolution lost: an image made smaller and enlarged again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.cascades.augmentations.base import Degradation, ranged
from jdiff.errors import choose
from jdiff.pytree import Array, static, struct


@struct
class DownUp(Degradation):
    """The augmentation that `down_up` makes."""

    low: Array | float
    high: Array | float
    share: Array | float
    down: str = static()
    up: str = static()
    tells: bool = static()

    name = "down_up"

    def apply(self, keys: Array, images: Array, level: Array) -> Array:
        """Each side n by way of round(n / 2^level) pixels, at least one; the keys are not used."""
        for axis in (1, 2):
            n = images.shape[axis]
            whole = jnp.full_like(level, n)
            part = jnp.clip(jnp.round(n * jnp.exp2(-level)), 1, n)
            for name, a, b in ((self.down, whole, part), (self.up, part, whole)):
                images = _along(jax.vmap(_WEIGHTS[name], (0, 0, None))(a, b, n), images, axis)
        return images


def down_up(
    low: Array | float = 0.0,
    high: Array | float = 2.0,
    down: str = "bicubic",
    up: str = "bilinear",
    share: Array | float = 1.0,
    tells: bool = False,
) -> DownUp:
    """Made smaller by a factor and enlarged again, level = log2 of the factor.

    One of the degradations of Real-ESRGAN (Wang et al. 2021, section 3.1), with factors of any
    size: SR3's input (Saharia et al. 2021) is level 2 for 4 times. Filters are those of
    `jax.image.resize`: widened by the factor on the way down (antialiased), pixels as areas.

    Args:
      low: the smallest level of training; 1 is half as many pixels a side.
      high: the largest.
      down: "area" (mean of what a pixel covers), "bilinear" or "bicubic".
      up: "bilinear", "bicubic" or "nearest".
      share: of images that are degraded.
      tells: whether the network is told the level.

    Raises:
      UserError: levels below 0 or not in order, an unknown filter, or a share outside [0, 1].
    """
    ranged("down_up", "low", low, "high", high, (0.0, float("inf")))
    ranged("down_up", "share", share, "share", share, (0.0, 1.0))
    choose("down_up: down", down, ("area", "bilinear", "bicubic"))
    choose("down_up: up", up, ("bilinear", "bicubic", "nearest"))
    return DownUp(low, high, share, down, up, tells)


def _along(weights: Array, images: Array, axis: int) -> Array:
    """Each image's own weights `[B, n, n]` applied along an axis.

    A sum apart from what surrounds it: the rounding of a matrix product, and of what is fused,
    depends on the batch's size.
    """
    weights, images = jax.lax.optimization_barrier((weights, images))
    x = jnp.moveaxis(images, axis, 1)
    return jnp.moveaxis((weights[..., None, None] * x[:, None]).sum(2), 1, axis)


def _bilinear(a: Array, b: Array, n: int) -> Array:
    return _filtered(lambda d: jnp.maximum(1.0 - d, 0.0), a, b, n)


def _bicubic(a: Array, b: Array, n: int) -> Array:
    """Keys' cubic (1981) with a = -1/2."""

    def keys(d: Array) -> Array:
        near, far = (1.5 * d - 2.5) * d * d + 1.0, ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
        return jnp.where(d < 1.0, near, jnp.where(d < 2.0, far, 0.0))

    return _filtered(keys, a, b, n)


def _filtered(kernel: Callable[[Array], Array], a: Array, b: Array, n: int) -> Array:
    """Weights `[n, n]` that make b pixels of a; the kernel is a / b pixels wide where that is > 1.

    Rows from b on are of no use: they meet columns of zeros on the way back.
    """
    row, column = _pixels(a.dtype, n)
    distance = jnp.abs((row + 0.5) * (a / b) - 0.5 - column) * jnp.minimum(b / a, 1.0)
    weights = jnp.where(column < a, kernel(distance), 0.0)
    return weights / jnp.where(row < b, weights.sum(1, keepdims=True), 1.0)


def _area(a: Array, b: Array, n: int) -> Array:
    """The share of each of a pixels in what one of b covers."""
    row, column = _pixels(a.dtype, n)
    end, start = (jnp.clip(edge * (a / b), column, column + 1.0) for edge in (row + 1.0, row))
    return (end - start) * (b / a)


def _nearest(a: Array, b: Array, n: int) -> Array:
    row, column = _pixels(a.dtype, n)
    place = (row + 0.5) * (a / b) + 1e-4  # of two as near, the later, however a / b is rounded
    return (column == jnp.floor(place)).astype(a.dtype)


def _pixels(dtype: Any, n: int) -> tuple[Array, Array]:
    """Numbers of rows `[n, 1]` and of columns `[n]`."""
    return jnp.arange(n, dtype=dtype)[:, None], jnp.arange(n, dtype=dtype)


# name -> (a, b, n) -> weights [n, n], the first b rows of which make b pixels of the first a.
# Factors are a / b and b / a: x / a for one sample is x (1 / a) to the compiler, for two it is not.
_WEIGHTS = {"area": _area, "bilinear": _bilinear, "bicubic": _bicubic, "nearest": _nearest}
