"""JPEG's losses: the 8 x 8 cosine transform, rounded to multiples of the standard tables."""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.cascades.augmentations.base import Degradation, ranged
from jdiff.errors import UserError
from jdiff.pytree import Array, static, struct

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance): row v, column u.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


@struct
class JPEG(Degradation):
    """The augmentation that `jpeg` makes; `low` and `high` are levels, 1 - quality / 100."""

    low: Array | float
    high: Array | float
    share: Array | float
    tells: bool = static()

    name = "jpeg"

    def apply(self, keys: Array, images: Array, level: Array) -> Array:
        """Each image as a file of its quality would show it; the keys are not used.

        Raises:
          UserError: neither 1 nor 3 channels.
        """
        _, h, w, channels = images.shape
        if channels not in (1, 3):
            raise UserError(f"jpeg: images have 1 or 3 channels, given {channels}.")
        pad = [(0, 0), (0, -h % 8), (0, -w % 8), (0, 0)]
        pixels = jnp.pad(_whole(127.5 * images + 127.5), pad, mode="edge")
        pixels = _through_blocks(_to_ycc(pixels), _tables(level, channels))
        return _from_ycc(pixels)[:, :h, :w] / 127.5 - 1.0


def jpeg(
    low_quality: Array | float = 30.0,
    high_quality: Array | float = 95.0,
    share: Array | float = 1.0,
    tells: bool = False,
) -> JPEG:
    """Compression by baseline JPEG, level = 1 - quality / 100 (Wang et al. 2021, Real-ESRGAN).

    What a file loses, without making one: 8 bits, YCbCr, and the transform's coefficients rounded
    to the standard tables (ITU-T T.81, K.1 and K.2), scaled by the quality as libjpeg does, which
    is rounded to a whole number. Chrominance is not sub-sampled (4:4:4). Sides that 8 does not
    divide are continued by their last pixel. Level 0 is the image itself, a little above it that of
    quality 100, whose pixels are rounded.

    Args:
      low_quality: of training, 1 to 100.
      high_quality: of training.
      share: of images that are compressed.
      tells: whether the network is told the level.

    Raises:
      UserError: qualities out of range or order, or a share outside [0, 1].
    """
    ranged("jpeg", "low_quality", low_quality, "high_quality", high_quality, (1.0, 100.0))
    ranged("jpeg", "share", share, "share", share, (0.0, 1.0))
    return JPEG(1.0 - 0.01 * high_quality, 1.0 - 0.01 * low_quality, share, tells)


def _tables(level: Array, channels: int) -> Array:
    """Steps of the coefficients `[B, 8, 8, channels]`, in libjpeg's whole numbers."""
    quality = jnp.clip(jnp.round(100.0 * (1.0 - level)), 1, 100).astype(jnp.int32)
    percent = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    chosen = (_LUMINANCE, _CHROMINANCE, _CHROMINANCE)[:channels]
    base = jnp.asarray(np.stack(chosen, -1), jnp.int32)
    scaled = (base * percent[:, None, None, None] + 50) // 100
    return jnp.clip(scaled, 1, 255)


def _through_blocks(pixels: Array, tables: Array) -> Array:
    """Pixels `[B, H, W, C]` in 0..255 after the transform, its rounding and its inverse."""
    b, h, w, c = pixels.shape
    blocks = pixels.reshape(b, h // 8, 8, w // 8, 8, c) - 128.0
    steps = tables[:, None, :, None].astype(pixels.dtype)
    forward = _transform().astype(pixels.dtype)
    coefficients = _along(_along(blocks, forward, 2), forward, 4)
    rounded = steps * jnp.round(coefficients / steps)
    blocks = _along(_along(rounded, forward.T, 2), forward.T, 4)
    return _whole(blocks.reshape(pixels.shape) + 128.0)


def _transform() -> Array:
    """The orthonormal cosine transform (DCT-II) of 8 numbers, one row a frequency."""
    frequency, place = np.arange(8)[:, None], np.arange(8)
    rows = 0.5 * np.cos(np.pi / 16 * (2 * place + 1) * frequency)
    return jnp.asarray(np.where(frequency == 0, np.sqrt(1 / 8), rows))


def _along(x: Array, matrix: Array, axis: int) -> Array:
    """The matrix applied along an axis, at full precision on every device."""
    y = jnp.tensordot(x, matrix, ((axis,), (1,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y, -1, axis)


def _to_ycc(rgb: Array) -> Array:
    """JFIF's Y, Cb, Cr, rounded; grey stays as it is."""
    if rgb.shape[-1] == 1:
        return rgb
    r, g, b = (rgb[..., i] for i in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = (b - y) / 1.772 + 128.0, (r - y) / 1.402 + 128.0
    return _whole(jnp.stack([y, cb, cr], -1))


def _from_ycc(ycc: Array) -> Array:
    """The inverse of `_to_ycc`, rounded."""
    if ycc.shape[-1] == 1:
        return ycc
    y, cb, cr = ycc[..., 0], ycc[..., 1] - 128.0, ycc[..., 2] - 128.0
    r, b = y + 1.402 * cr, y + 1.772 * cb
    return _whole(jnp.stack([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], -1))


def _whole(pixels: Array) -> Array:
    """Rounded to 8 bits."""
    return jnp.round(jnp.clip(pixels, 0.0, 255.0))
