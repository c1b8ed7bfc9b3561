"""Frequency-decoupled guidance (Sadat et al. 2025, 2506.19713): less for the low frequencies."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.guidance.base import Pair, Refinement, refinable
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, expand, static, struct

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@struct
class Frequency(Refinement):
    """The guided denoiser that `frequency` makes."""

    denoiser: Any
    low: Array | float
    octaves: int = static(1)

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The inner result, with less of the guidance in its low band."""
        guided = self.denoiser.guide(x, t, pair)

        def damp(made: Array, good: Array) -> Array:
            band = low_band(made - good, self.octaves)
            return made - (1.0 - expand(self.low, band)) * band

        good = pair.good
        x0, eps = jax.tree.map(damp, (guided.x0, guided.eps), (good.x0, good.eps))
        return guided._replace(x0=x0, eps=eps)


def low_band(image: Array, octaves: int) -> Array:
    """What a Laplacian pyramid holds below its finest `octaves` levels. `[B, H, W, C]`, linear.

    Burt and Adelson's pyramid: blur with the binomial (1, 4, 6, 4, 1) / 16 and halve, then double
    and blur; edges are reflected. Sizes that do not halve are rounded down, no smaller than 1.
    """
    sizes = [image.shape[1:3]]
    small = image
    for _ in range(octaves):
        h, w = (max(1, n // 2) for n in sizes[-1])
        sizes.append((h, w))
        small = _resize(_blur(small), (h, w))
    for size in reversed(sizes[:-1]):
        small = _blur(_resize(small, size))
    return small


def frequency(denoise: Any, low: Array | float = 0.5, octaves: int = 1) -> Frequency:
    """Keeps only the share `low` of the guidance in the low frequencies.

    What guidance added is split into a high and a low band; high frequencies have the guidance's
    own scale w, low ones 1 + low (w - 1): the paper's w_low = 5, w_high = 10 is low = 4 / 9 around
    cfg with scale 10. low = 1 changes nothing. The split is linear, so that x0, eps and the
    velocity are split alike.

    Args:
      denoise: a guidance that extrapolates (cfg, ...), on images `[B, H, W, C]`.
      low: the share, a number or `[B]`.
      octaves: how many octaves from the top count as high.

    Raises:
      UserError: fewer than one octave, or nothing to refine; at the call, a leaf that is not
        `[B, H, W, C]`.
    """
    if octaves < 1:
        raise UserError(f"frequency: octaves={octaves} given; it is at least 1.")
    return Frequency(refinable("frequency", denoise), low, octaves)


def _resize(image: Array, size: tuple[int, int]) -> Array:
    """Bilinear, without antialiasing: the blur has done that."""
    shape = (image.shape[0], *size, image.shape[3])
    return jax.image.resize(image, shape, "linear", antialias=False)


def _blur(image: Array) -> Array:
    if image.ndim != 4:
        raise UserError(f"frequency: images [B, H, W, C] are needed, given shape {image.shape}.")
    for axis in (1, 2):
        n = image.shape[axis]
        pad = [(0, 0)] * 4
        pad[axis] = (2, 2)
        padded = jnp.pad(image, pad, mode="reflect" if n > 2 else "edge")
        slices = [jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(5)]
        image = sum(w * a for w, a in zip(_BINOMIAL, slices))
    return image
