"""How near a reconstruction is to its image, pixel by pixel, and the image that a network means.

An output is what the decoder's last convolution gives; `image` makes the picture of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.pytree import Array

#: DALL-E's margin: pixels in [0, 1] become eps + (1 - 2 eps) x, away from where the logit is
#: infinite.
MARGIN = 0.1


class Pixels(NamedTuple):
    """One way to measure.

    Attributes:
      distance: (output [B, H, W, outputs * C], image [B, H, W, C] in [-1, 1]) -> [B], a mean over
        entries.
      image: output -> the image in [-1, 1] that it means (not clipped).
      outputs: channels of the output for each of the image.
    """

    distance: Callable[[Array, Array], Array]
    image: Callable[[Array], Array]
    outputs: int


def l1(output: Array, x: Array) -> Array:
    """Mean absolute difference [B]."""
    return _mean(jnp.abs(output - x))


def l2(output: Array, x: Array) -> Array:
    """Mean squared difference [B]."""
    return _mean(jnp.square(output - x))


def logit_laplace(output: Array, x: Array) -> Array:
    """Minus the log-density [B] of the pixels, nats an entry; Ramesh et al. 2021, appendix A.3.

    With y = eps + (1 - 2 eps) (x + 1) / 2 in (0, 1), the output (mu, ln b) gives y the density
    exp(-|logit(y) - mu| / b) / (2 b y (1 - y)): the logit of y is Laplace-distributed.
    """
    mu, log_scale = jnp.split(output, 2, axis=-1)
    y = MARGIN + (1 - 2 * MARGIN) * (x + 1) / 2
    gap = jnp.abs(jnp.log(y) - jnp.log1p(-y) - mu)
    log_density = -gap * jnp.exp(-log_scale) - log_scale - jnp.log(2 * y * (1 - y))
    return -_mean(log_density)


def logit_laplace_image(output: Array) -> Array:
    """The image of (mu, ln b): sigmoid(mu) without the margin, in [-1, 1] and a little beyond."""
    mu, _ = jnp.split(output, 2, axis=-1)
    return (jax.nn.sigmoid(mu) - MARGIN) / (1 - 2 * MARGIN) * 2 - 1


#: What config.loss.pixels names.
BY_NAME = {
    "l1": Pixels(l1, lambda output: output, 1),
    "l2": Pixels(l2, lambda output: output, 1),
    "logit_laplace": Pixels(logit_laplace, logit_laplace_image, 2),
}


def _mean(values: Array) -> Array:
    return values.mean((1, 2, 3))
