"""The discriminator that judges patches (Isola et al. 2017, PatchGAN), as VQGAN and LDM use it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers
from jdiff.models.initializers import normal
from jdiff.models.layers import Conv, GroupNorm
from jdiff.models.module import Module


class PatchGAN(Module):
    """Images [B, H, W, C] to a logit for each of some overlapping patches, [B, h, w].

    4 x 4 convolutions: `depth` that halve the image and double the channels (up to 8 times), one
    that doubles them again, one to the logit; leaky rectifiers of slope 0.2. With depth 3 a patch
    has 70 x 70 pixels. Where pix2pix normalises over the batch, this does it over groups of
    channels of each image: no running averages, and a verdict does not depend on the other images.

    Args:
      channels: of the first layer.
      depth: layers that halve.
      in_channels: of the images.
    """

    def __init__(self, *, channels: int = 64, depth: int = 3, in_channels: int = 3, rngs: nnx.Rngs):
        layers.check_positive(channels=channels, depth=depth)
        conv = functools.partial(Conv, size=4, init=normal(0.02), padding=1, rngs=rngs)
        widths = [channels * min(2**n, 8) for n in range(depth + 1)]
        self.stem = conv(in_channels, channels, stride=2)
        self.convs = nnx.List(
            conv(before, after, stride=2 if n < depth - 1 else 1)
            for n, (before, after) in enumerate(zip(widths, widths[1:]))
        )
        self.norms = nnx.List(GroupNorm(width, eps=1e-5, rngs=rngs) for width in widths[1:])
        self.out = conv(widths[-1], 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, h, w], above 0 for patches that look real."""
        h = _leaky(self.stem(x))
        for conv, norm in zip(self.convs, self.norms):
            h = _leaky(norm(conv(h)))
        return self.out(h)[..., 0]


def smallest(depth: int) -> int:
    """The least side of an image that has a patch."""
    side = 1
    for stride in (1, 1, *(2,) * depth):  # backwards: out = (side + 2 - 4) // stride + 1
        side = (side - 1) * stride + 2
    return side


def _leaky(h: jax.Array) -> jax.Array:
    return jnp.where(h > 0, h, 0.2 * h)
