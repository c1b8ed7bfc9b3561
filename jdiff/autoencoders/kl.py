"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022): SD, SDXL, SD3, FLUX."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.autoencoders.base import Moments, gaussian
from jdiff.autoencoders.blocks import Decoder, Encoder
from jdiff.models import layers
from jdiff.models.module import Module
from jdiff.models.unet_blocks import INITS


class KL(Module):
    """An autoencoder whose encoder gives a normal distribution of latents.

    Args:
      channels: of the latents.
      widths: channels of the levels, from the full resolution down; the factor is 2^(levels - 1).
      blocks: residual blocks a level of the encoder; the decoder has one more.
      in_channels: of the images that are encoded.
      out_channels: of those that are decoded.
      groups: of the normalisations; None: min(32, channels / 4), or the next smaller divisor.
      attention: whether the middles attend.
      quant: whether a 1 x 1 convolution ends the encoder.
      post_quant: whether one begins the decoder.
      dtype: of the activations; the moments are float32.
      remat: what the backward pass keeps, see `jdiff.models.remat`.

    Attributes:
      factor: pixels of a side that are one latent's.
    """

    def __init__(
        self,
        *,
        channels: int = 4,
        widths: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        groups: int | None = 32,
        attention: bool = True,
        quant: bool = True,
        post_quant: bool = True,
        dtype: str | jnp.dtype = "float32",
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(channels=channels, blocks=blocks)
        dtype = layers.float_dtype(dtype)
        self.channels, self.factor = channels, 2 ** (len(widths) - 1)
        shared = {"widths": tuple(widths), "blocks": blocks, "attention": attention}
        shared |= {"groups": groups, "dtype": dtype, "remat": remat, "rngs": rngs}
        self.encoder = Encoder(in_channels, 2 * channels, **shared)
        self.decoder = Decoder(channels, out_channels, **shared)
        conv = INITS["adm"].conv
        self.quant = conv(*(2 * channels,) * 2, 1, dtype=dtype, rngs=rngs) if quant else None
        self.post_quant = conv(*(channels,) * 2, 1, dtype=dtype, rngs=rngs) if post_quant else None

    def encode(self, x: jax.Array) -> Moments:
        """The distribution of the latents [B, H / factor, W / factor, channels] of x [B, H, W, 3].

        Log-variances are clipped to [-30, 20].
        """
        h = self.encoder(x)
        return gaussian(h if self.quant is None else self.quant(h))

    def decode(self, z: jax.Array) -> jax.Array:
        """Images [B, h factor, w factor, out_channels] of z [B, h, w, channels]."""
        return self.decoder(z if self.post_quant is None else self.post_quant(z))


def kl_sd(**changes: Any) -> dict[str, Any]:
    """Fields of the autoencoder of Stable Diffusion 1, 2 and XL (83.7 M parameters)."""
    return {"channels": 4} | changes


def kl_sd3(**changes: Any) -> dict[str, Any]:
    """Fields of that of Stable Diffusion 3 and FLUX.1 (83.8 M parameters): 16 channels."""
    return {"channels": 16, "quant": False, "post_quant": False} | changes
