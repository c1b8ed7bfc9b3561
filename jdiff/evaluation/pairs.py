"""How near an image is to its truth: PSNR and SSIM, for images that were enlarged or restored.

Both compare pixel by pixel, so that a sharp sample of many possible ones scores below their blurred
mean (Saharia et al. 2021, SR3, section 4.2); they say how much of the truth is kept, not how real
an image looks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.pytree import Array

#: The window of SSIM as published: its side in pixels, and the deviation of its Gaussian.
WINDOW, SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(images: Array, truth: Array, data_range: float | None = None) -> Array:
    """Peak signal-to-noise ratio of each image in decibels, `[N]`: 10 log10(range^2 / MSE).

    The mean square is over pixels and channels (all of them, not the luminance alone); infinite for
    an image that is its truth.

    Args:
      images, truth: `[N, H, W, C]` each, both uint8 or both float.
      data_range: the largest value less the smallest that an image may have: 255 for uint8 unless
        given; of floats it has to be given (2 for images in [-1, 1]).

    Raises:
      UserError: other shapes or types, or floats without their range.
    """
    span = _checked(images, truth, data_range)
    return _psnr(images, truth, span)


def ssim(
    images: Array, truth: Array, data_range: float | None = None, window: int | None = None
) -> Array:
    """Mean structural similarity of each image, `[N]`, at most 1, which is the truth itself.

    With means, variances and covariance under an 11 x 11 Gaussian window of deviation 1.5 (its
    weights sum to 1), C1 = (0.01 range)^2 and C2 = (0.03 range)^2:

        (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)),

    averaged over all places where the window lies inside the image, and over channels. (That is
    scikit-image's structural_similarity with gaussian_weights=True, use_sample_covariance=False.)
    Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment", eq 13 and III-C.

    Args:
      images, truth, data_range: as in `psnr`.
      window: side of the window, odd; `window_of(shape)` unless given: 11, or what fits.

    Raises:
      UserError: as `psnr`; a window that is even or larger than the images.
    """
    span = _checked(images, truth, data_range)
    shape = np.shape(images)[1:]
    window = window_of(shape) if window is None else window
    if window % 2 == 0 or not 1 <= window <= min(shape[:2]):
        raise UserError(
            f"ssim: window={window} given; it is odd and at most {min(shape[:2])}, their side."
        )
    return _ssim(images, truth, span, window=window)


def window_of(shape: tuple[int, int, int]) -> int:
    """The side of SSIM's window for images (H, W, C): 11, or the largest odd one that fits.

    Figures of different windows do not compare.
    """
    side = min(shape[:2])
    return min(WINDOW, side if side % 2 else side - 1)


@jax.jit
def _psnr(images: Array, truth: Array, span: Array) -> Array:
    gap = _float(images) - _float(truth)
    return 10.0 * (2 * jnp.log10(span) - jnp.log10((gap**2).mean((1, 2, 3))))


@partial(jax.jit, static_argnames="window")
def _ssim(images: Array, truth: Array, span: Array, *, window: int) -> Array:
    x, y = _float(images), _float(truth)
    # Variances are differences of means of squares, which cancel the less the smaller the values;
    # shifts of the images change neither them nor the covariance.
    shift_x, shift_y = (image.mean((1, 2), keepdims=True) for image in (x, y))
    around = jnp.arange(window) - window // 2
    kernel = jnp.exp(-0.5 * (around / SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).astype(x.dtype)
    mean = lambda a: _along(_along(a, kernel, 1), kernel, 2)
    a, b = x - shift_x, y - shift_y
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    m_x, m_y = mean_a + shift_x, mean_b + shift_y
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    luminance = (2 * m_x * m_y + c1) / (m_x**2 + m_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean((1, 2, 3))


def _along(a: Array, kernel: Array, axis: int) -> Array:
    """`a` under the kernel along an axis, where the kernel lies inside."""
    length = a.shape[axis] - len(kernel) + 1
    cut = partial(jax.lax.slice_in_dim, a, axis=axis)
    return sum(kernel[i] * cut(i, i + length) for i in range(len(kernel)))


def _float(images: Array) -> Array:
    images = jnp.asarray(images)
    return images.astype(jnp.result_type(float)) if images.dtype == jnp.uint8 else images


def _checked(images: Array, truth: Array, data_range: float | None) -> Array:
    """The data range, if the images fit each other."""
    shapes, kinds = (np.shape(images), np.shape(truth)), (_kind(images), _kind(truth))
    if shapes[0] != shapes[1] or len(shapes[0]) != 4:
        raise UserError(
            f"images {shapes[0]} and their truth {shapes[1]} do not compare: [N, H, W, C] each."
        )
    if kinds[0] != kinds[1] or "other" in kinds:
        raise UserError(
            f"images {jnp.result_type(images)} and their truth {jnp.result_type(truth)} do not "
            "compare: both uint8, or both float."
        )
    if data_range is None and kinds[0] == "float":
        raise UserError("data_range: it is not known of floats; give 2.0 for images in [-1, 1].")
    return jnp.asarray(255.0 if data_range is None else data_range)


def _kind(images: Array) -> str:
    dtype = jnp.result_type(images)
    if dtype == jnp.uint8:
        return "uint8"
    return "float" if jnp.issubdtype(dtype, jnp.floating) else "other"
