"""DC-AE, the deep compression autoencoder (Chen et al., 2024): sides 32, 64 or 128 times smaller.

Every step between two sizes has a shortcut without weights, which makes the steps easy to learn:
pixels are folded into channels and averaged in groups on the way down, channels are repeated and
unfolded into pixels on the way up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.autoencoders.base import Moments, at_least_float32, certain
from jdiff.autoencoders.dc_blocks import (
    ACTIVATIONS,
    NORMS,
    Down,
    EfficientViT,
    Residual,
    Up,
    average,
    conv,
)
from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.module import Module


class Size(NamedTuple):
    """The blocks at one size of the images.

    Attributes:
      width: channels.
      depth: number of blocks; 0 at full size alone, where the network then has no layer.
      block: "residual" or "efficient_vit".
      scales: of the attention, see `LinearAttention`.
      norm: a name in `NORMS`.
      activation: of residual blocks, a name in `ACTIVATIONS`.
    """

    width: int
    depth: int
    block: str = "residual"
    scales: tuple[int, ...] = ()
    norm: str = "rms_norm"
    activation: str = "silu"


#: The encoder's sizes of SANA's f32c32 (Xie et al., 2024).
F32 = tuple(
    Size(width, depth, "residual" if i < 3 else "efficient_vit", () if i < 3 else (5,))
    for i, (width, depth) in enumerate(zip((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3)))
)


class DCAutoencoder(Module):
    """Images [B, H, W, image_channels] to latents [B, H / factor, W / factor, channels] and back.

    The latents are no distribution: their deviation is zero.

    Args:
        channels: of the latents.
        encoder: its sizes, from the image's on.
        decoder: its sizes, in the same order, of the same number.
        head: channels of a head of the attention.
        folded: whether steps down convolve first and fold pixels into channels then, instead of
            convolving with a stride.
        unfolded: whether steps up convolve first and unfold channels into pixels then, instead of
            convolving repeated pixels.
        encoder_shortcut: whether the latents start from the mean of the last features' channels.
        decoder_shortcut: whether the first features start from the latents' repeated channels.
        last_activation: ahead of the decoder's last convolution, a name in `ACTIVATIONS`.
        dtype: of the activations; parameters, norms and attention's sums stay float32.

    Attributes:
        factor: by how much the sides of an image are smaller in its latents.

    Raises:
        ValueError: if encoder and decoder differ in their number of sizes, a size but the first has
            no block, or channels do not divide as the shortcuts need it.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        channels: int = 32,
        encoder: Sequence[Size] = F32,
        decoder: Sequence[Size] = tuple(size._replace(depth=3) for size in F32),
        head: int = 32,
        folded: bool = False,
        unfolded: bool = False,
        encoder_shortcut: bool = True,
        decoder_shortcut: bool = True,
        last_activation: str = "relu",
        dtype: str | jnp.dtype = "float32",
        rngs: nnx.Rngs,
    ):
        encoder, decoder = ([Size(*size) for size in sizes] for sizes in (encoder, decoder))
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder has {len(encoder)} sizes and decoder {len(decoder)}")
        for name, sizes in {"encoder": encoder, "decoder": decoder}.items():
            _check(name, sizes, channels)
        self.channels, self.factor = channels, 2 ** (len(encoder) - 1)
        self.dtype = layers.float_dtype(dtype)
        make = {"dtype": self.dtype, "rngs": rngs}
        self.encoder = Encoder(
            image_channels, channels, encoder, head, folded, encoder_shortcut, **make
        )
        self.decoder = Decoder(
            channels, image_channels, decoder, head, unfolded, decoder_shortcut, last_activation,
            **make,
        )  # fmt: skip

    def encode(self, x: jax.Array) -> Moments:
        """The latents of images x [B, H, W, image_channels] in [-1, 1], and zeros."""
        return certain(self.encoder(x.astype(self.dtype)))

    def decode(self, z: jax.Array) -> jax.Array:
        """Images [B, H, W, image_channels] of latents, not clipped to [-1, 1]."""
        return at_least_float32(self.decoder(z.astype(self.dtype)))


def _check(name: str, sizes: Sequence[Size], channels: int) -> None:
    if any(size.depth < 1 for size in sizes[1:]):
        raise ValueError(f"{name}: only the first size may have no blocks, not {list(sizes)}")
    first = 0 if sizes[0].depth else 1
    widths = [size.width for size in sizes[first:]]
    if any(4 * a % b for a, b in zip(widths, widths[1:])):
        raise ValueError(f"{name}: widths {widths}: each must divide four times the one before")
    if widths[-1] % channels:
        raise ValueError(f"{name}: channels={channels} does not divide its last width {widths[-1]}")


def _blocks(size: Size, head: int, **make) -> list[Module]:
    """The blocks at one size."""
    fields = {"norm": size.norm} | make
    build = {
        "residual": lambda: Residual(size.width, activation=size.activation, **fields),
        "efficient_vit": lambda: EfficientViT(size.width, head=head, scales=size.scales, **fields),
    }
    return [build[choose("block", size.block, build)]() for _ in range(size.depth)]


class Encoder(Module):
    """Images to latents; each size's list ends with the step to the next one."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        sizes: Sequence[Size],
        head: int,
        folded: bool,
        shortcut: bool,
        **make,
    ):
        if sizes[0].depth:
            self.in_conv = conv(channels_in, sizes[0].width, **make)
        else:
            self.in_conv = Down(channels_in, sizes[1].width, folded=folded, shortcut=False, **make)
        self.sizes = nnx.List([])
        for i, size in enumerate(sizes):
            blocks = _blocks(size, head, **make)
            if blocks and i + 1 < len(sizes):
                blocks.append(Down(size.width, sizes[i + 1].width, folded=folded, **make))
            self.sizes.append(nnx.List(blocks))
        self.out_conv = conv(sizes[-1].width, channels_out, **make)
        self.shortcut, self.channels = shortcut, channels_out

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels_in] to [B, H / factor, W / factor, channels_out]."""
        x = self.in_conv(x)
        for blocks in self.sizes:
            for block in blocks:
                x = block(x)
        y = self.out_conv(x)
        return y + average(x, self.channels) if self.shortcut else y


class Decoder(Module):
    """Latents to images; each size's list starts with the step from the smaller one."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        sizes: Sequence[Size],
        head: int,
        unfolded: bool,
        shortcut: bool,
        last_activation: str,
        **make,
    ):
        self.repeats = sizes[-1].width // channels_in if shortcut else 0
        self.in_conv = conv(channels_in, sizes[-1].width, **make)
        self.sizes = nnx.List([])
        for i, size in enumerate(sizes):
            blocks = _blocks(size, head, **make)
            if blocks and i + 1 < len(sizes):
                blocks.insert(0, Up(sizes[i + 1].width, size.width, unfolded=unfolded, **make))
            self.sizes.append(nnx.List(blocks))
        last = (sizes[0] if sizes[0].depth else sizes[1]).width
        self.out_norm = NORMS["rms_norm"](last, rngs=make["rngs"])
        self.activation = ACTIVATIONS[choose("last_activation", last_activation, ACTIVATIONS)]
        if sizes[0].depth:
            self.out_conv = conv(last, channels_out, **make)
        else:
            self.out_conv = Up(last, channels_out, unfolded=unfolded, shortcut=False, **make)

    def __call__(self, z: jax.Array) -> jax.Array:
        """[B, h, w, channels_in] to [B, h * factor, w * factor, channels_out]."""
        x = self.in_conv(z)
        if self.repeats:
            x = x + jnp.repeat(z, self.repeats, axis=-1)
        for blocks in reversed(self.sizes):
            for block in blocks:
                x = block(x)
        return self.out_conv(self.activation(self.out_norm(x)))
