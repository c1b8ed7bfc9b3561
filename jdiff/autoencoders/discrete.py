"""Autoencoders whose latents are codes: the network, around a quantiser of `vq` or `fsq`.

Diffusion works on the latents as the encoder gives them; decoding begins with quantising (Rombach
et al. 2022, section 3.1: the quantiser belongs to the decoder).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.autoencoders.base import Moments, certain
from jdiff.autoencoders.blocks import Decoder, Encoder
from jdiff.models import layers
from jdiff.models.module import Module
from jdiff.models.unet_blocks import INITS
from jdiff.pytree import Array


class Quantized(NamedTuple):
    """What a quantiser makes of latents [B, h, w, C].

    Attributes:
      z: the codes' vectors [B, h, w, C]; their gradient is that of the latents (straight through).
      index: int [B, h, w], of the code.
      penalty: [B], to be added to the loss.
    """

    z: Array
    index: Array
    penalty: Array


def straight_through(z: Array, q: Array) -> Array:
    """The value q with the gradient of z (Bengio et al. 2013)."""
    return z + jax.lax.stop_gradient(q - z)


def counts(index: Array, codes: int) -> Array:
    """How often each of the codes occurs, float [codes]."""
    return jnp.zeros(codes).at[index.reshape(-1)].add(1.0)


def perplexity(counts: Array) -> Array:
    """exp of the entropy of the codes: as many used equally often would have it."""
    p = counts / counts.sum()
    return jnp.exp(-jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum())


class Discrete(Module):
    """The convolutional encoder and decoder of `kl.KL`, and a quantiser between them.

    Attributes:
      factor: pixels of a side that are one latent's.
      channels: of the latents.
      codes: how many there are.
      quantizer: with `encoded(h)`, the latents in which it works, and `quantize(z, key)`.
    """

    def __init__(
        self,
        quantizer: Module,
        *,
        channels: int,
        codes: int,
        widths: Sequence[int],
        blocks: int,
        in_channels: int,
        out_channels: int,
        groups: int | None,
        attention: bool,
        dtype: str | jnp.dtype,
        remat: bool | str,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(channels=channels, blocks=blocks)
        dtype = layers.float_dtype(dtype)
        self.channels, self.codes, self.factor = channels, codes, 2 ** (len(widths) - 1)
        shared = {"widths": tuple(widths), "blocks": blocks, "attention": attention}
        shared |= {"groups": groups, "dtype": dtype, "remat": remat, "rngs": rngs}
        conv = INITS["adm"].conv
        self.encoder = Encoder(in_channels, channels, **shared)
        self.quant = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.quantizer = quantizer
        self.post_quant = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(channels, out_channels, **shared)

    def encode(self, x: jax.Array) -> Moments:
        """The latents [B, H / factor, W / factor, channels] of x, not quantised, without spread."""
        z = certain(self.quant(self.encoder(x))).mean
        return certain(self.quantizer.encoded(z))

    def quantize(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        """The codes nearest to z [B, h, w, channels]; `key` in training alone."""
        return self.quantizer.quantize(z, key)

    def image(self, q: jax.Array) -> jax.Array:
        """Images [B, h factor, w factor, out_channels] of codes' vectors [B, h, w, channels]."""
        return self.decoder(self.post_quant(q))

    def decode(self, z: jax.Array) -> jax.Array:
        """Images of latents z [B, h, w, channels], which are quantised first."""
        return self.image(self.quantize(z).z)
