"""The tiny autoencoder of Bohan (TAESD, 2023): previews of latents at a fraction of the cost."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.autoencoders.base import Moments, certain
from jdiff.models import layers
from jdiff.models.layers import Conv
from jdiff.models.module import Module
from jdiff.models.unet_blocks import INITS


class TinyBlock(layers.ResidualBlock):
    """relu(x + f(x)), f: three 3 x 3 convolutions with relu between."""

    def __init__(self, width: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        conv = functools.partial(INITS["adm"].conv, width, width, 3, dtype=dtype, rngs=rngs)
        self.conv1, self.conv2, self.conv3 = conv(), conv(), conv()

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, width] to the same."""
        h = jax.nn.relu(self.conv1(x))
        return jax.nn.relu(x + self.conv3(jax.nn.relu(self.conv2(h))))


class TinyLevel(Module):
    """A convolution and residual blocks (the encoder's order), or blocks and a convolution."""

    def __init__(self, conv: Conv, blocks: Sequence[TinyBlock]):
        self.conv, self.blocks = conv, nnx.List(blocks)

    def run(self, h: jax.Array) -> jax.Array:
        """The blocks."""
        for block in self.blocks:
            h = block(h)
        return h


class Tiny(Module):
    """An autoencoder of plain convolutions whose encoder gives latents and no distribution.

    Args:
      channels: of the latents.
      width: channels of every level.
      encoder_blocks: residual blocks a level, from the full resolution down.
      decoder_blocks: from the lowest resolution up.
      in_channels: of the images that are encoded.
      out_channels: of those that are decoded.
      dtype: of the activations.

    Attributes:
      factor: 2^(levels - 1) pixels of a side are one latent's.
      blend: how its tiles are put together, see `tiles`.

    Raises:
      ValueError: an encoder and a decoder with different numbers of levels.
    """

    blend = "covering"

    def __init__(
        self,
        *,
        channels: int = 4,
        width: int = 64,
        encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        in_channels: int = 3,
        out_channels: int = 3,
        dtype: str | jnp.dtype = "float32",
        rngs: nnx.Rngs,
    ):
        layers.check_positive(channels=channels, width=width)
        if len(encoder_blocks) != len(decoder_blocks):
            raise ValueError(
                f"encoder_blocks={tuple(encoder_blocks)} and decoder_blocks="
                f"{tuple(decoder_blocks)} must be of one length: their levels are."
            )
        dtype = layers.float_dtype(dtype)
        self.channels, self.factor = channels, 2 ** (len(encoder_blocks) - 1)
        conv = functools.partial(INITS["adm"].conv, dtype=dtype, rngs=rngs)
        plain = functools.partial(
            Conv, width, width, 3, init=INITS["adm"].kernel(9 * width, 9 * width),
            bias_init=None, dtype=dtype, rngs=rngs,
        )  # fmt: skip

        def level(made: Conv, blocks: int) -> TinyLevel:
            return TinyLevel(
                made, [TinyBlock(width, dtype=dtype, rngs=rngs) for _ in range(blocks)]
            )

        halve = functools.partial(plain, stride=2, padding=1)
        self.encoder = nnx.List(
            level(halve() if n else conv(in_channels, width, 3), blocks)
            for n, blocks in enumerate(encoder_blocks)
        )
        self.to_latents = conv(width, channels, 3)
        self.from_latents = conv(channels, width, 3)
        last = len(decoder_blocks) - 1
        self.decoder = nnx.List(
            level(plain() if n < last else conv(width, out_channels, 3), blocks)
            for n, blocks in enumerate(decoder_blocks)
        )

    def encode(self, x: jax.Array) -> Moments:
        """Latents [B, H / factor, W / factor, channels], without deviation, of x [B, H, W, 3]."""
        h = (x + 1) / 2  # images in [0, 1] inside
        for level in self.encoder:
            h = level.run(level.conv(h))
        return certain(self.to_latents(h))

    def decode(self, z: jax.Array) -> jax.Array:
        """Images [B, h factor, w factor, out_channels] of z [B, h, w, channels]."""
        h = jax.nn.relu(self.from_latents(3 * jnp.tanh(z / 3)))
        for n, level in enumerate(self.decoder):
            h = level.run(h)
            h = level.conv(layers.upsample(h) if n < len(self.decoder) - 1 else h)
        return 2 * h - 1


def taesd(**changes: Any) -> dict[str, Any]:
    """Fields of the tiny autoencoder of Stable Diffusion 1, 2 and XL (2.4 M parameters)."""
    return {"channels": 4} | changes
