"""Gaussian blur of the low-resolution image."""

import jax
import jax.numpy as jnp

from jdiff.cascades.augmentations.base import Degradation, ranged
from jdiff.errors import UserError, positive
from jdiff.pytree import Array, expand, static, struct


@struct
class Blur(Degradation):
    """The augmentation that `blur` makes."""

    low: Array | float
    high: Array | float
    share: Array | float
    size: int = static()
    tells: bool = static()

    name = "blur"

    def apply(self, keys: Array, images: Array, level: Array) -> Array:
        """Each image convolved with its own kernel, edges reflected; the keys are not used.

        Raises:
          UserError: images too small to be reflected.
        """
        half = self.size // 2
        if min(images.shape[1:3]) <= half:
            raise UserError(
                f"blur: size={self.size} needs images of more than {half} pixels a side, given "
                f"{images.shape[1]} x {images.shape[2]}."
            )
        weights = _kernel(level, half)
        # A sum of shifted images, not a convolution, whose rounding depends on the batch's size.
        for axis in (1, 2):
            n = images.shape[axis]
            pad = [(half, half) if a == axis else (0, 0) for a in range(4)]
            padded = jnp.pad(images, pad, mode="reflect")
            images = sum(
                expand(weights[:, i], images) * jax.lax.slice_in_dim(padded, i, i + n, axis=axis)
                for i in range(self.size)
            )
        return images


def blur(
    size: int = 3,
    low: Array | float = 0.4,
    high: Array | float = 0.6,
    share: Array | float = 0.5,
    tells: bool = False,
) -> Blur:
    """Blur with a size x size Gaussian kernel whose level is its sigma, in pixels.

    CDM's augmentation at 128 and 256 pixels (Ho et al. 2022): 3 x 3, sigma ~ U(0.4, 0.6), half of
    the images of training and none in sampling. The kernel is sampled at whole pixels and sums to
    1; edges are reflected without repeating the outermost pixel (torchvision's "reflect").

    Args:
      size: of the kernel, odd.
      low: the smallest sigma.
      high: the largest.
      share: of images that are blurred.
      tells: whether the network is told sigma (0 for images that are not blurred).

    Raises:
      UserError: an even size, a range that is not positive, or a share outside [0, 1].
    """
    if size < 1 or size % 2 == 0:
        raise UserError(f"blur: size={size} given; it is an odd number of pixels, e.g. 3.")
    positive("blur", low=low)
    ranged("blur", "low", low, "high", high, (0.0, float("inf")))
    ranged("blur", "share", share, "share", share, (0.0, 1.0))
    return Blur(low, high, share, size, tells)


def _kernel(sigma: Array, half: int) -> Array:
    """Weights `[B, 2 half + 1]` that sum to 1; any for sigma = 0."""
    offset = jnp.arange(-half, half + 1, dtype=sigma.dtype)
    width = jnp.where(sigma == 0, 1.0, sigma)[:, None]
    weights = jnp.exp(-0.5 * (offset * (1.0 / width)) ** 2)
    return weights / weights.sum(1, keepdims=True)
