"""Qwen-Image's autoencoder (Wu et al., 2025), which is Wan's for videos, on single images.

The networks are causal in time: each convolution sees its frame and the two before, and ahead of
the first frame there are zeros. Of a kernel [3, H, W] the first frame thus meets only the last
slice, and an image, a video of one frame, is convolved in space alone. Nor is it resampled in time:
the encoder halves and the decoder doubles the frames after the first. The kernels' other slices are
kept as they are, so that a checkpoint is written back whole.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.autoencoders.base import Moments, at_least_float32, gaussian
from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.initializers import kaiming_uniform, ones, param, zeros
from jdiff.models.layers import Conv, Linear, ResidualBlock
from jdiff.models.module import Module

_GAIN = math.sqrt(1 / 3)  # of PyTorch's layers


class QwenAutoencoder(Module):
    """Images [B, H, W, image_channels] to moments [B, H / factor, W / factor, channels] and back.

    Args:
        channels: of the latents.
        width: channels of the images' features at full size.
        multipliers: of the width at each size; between two, sides are halved or doubled.
        depth: residual blocks at each size; the decoder has one more.
        temporal: whether the networks have weights to halve the frames, too, from each size to
            the next; images leave them alone.
        dtype: of the activations; parameters and norms stay float32.

    Attributes:
        factor: by how much the sides of an image are smaller in its latents.

    Raises:
        ValueError: if `temporal` does not name every step between two sizes.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        channels: int = 16,
        width: int = 96,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        depth: int = 2,
        temporal: Sequence[bool] = (False, True, True),
        dtype: str | jnp.dtype = "float32",
        rngs: nnx.Rngs,
    ):
        layers.check_positive(channels=channels, width=width, depth=depth)
        if len(temporal) != len(multipliers) - 1:
            raise ValueError(
                f"temporal={list(temporal)} must say for each of the {len(multipliers) - 1} steps "
                f"between multipliers={list(multipliers)} whether it is one in time"
            )
        self.channels, self.factor = channels, 2 ** len(temporal)
        self.dtype = layers.float_dtype(dtype)
        widths = [width * m for m in multipliers]
        make = {"dtype": self.dtype, "rngs": rngs}
        self.encoder = Encoder(image_channels, 2 * channels, width, widths, depth, temporal, **make)
        self.to_moments = CausalConv(2 * channels, 2 * channels, 1, **make)
        self.from_latents = CausalConv(channels, channels, 1, **make)
        self.decoder = Decoder(
            channels, image_channels, widths[::-1], depth, temporal[::-1], **make
        )

    def encode(self, x: jax.Array) -> Moments:
        """The distribution of the latents of images x [B, H, W, image_channels] in [-1, 1]."""
        return gaussian(self.to_moments(self.encoder(x)))

    def decode(self, z: jax.Array) -> jax.Array:
        """Images [B, H, W, image_channels] of latents, not clipped to [-1, 1]."""
        return at_least_float32(self.decoder(self.from_latents(z)))


class CausalConv(Module):
    """A convolution in time and space of the first frame [B, H, W, C] of a video.

    Its kernel is [times, H, W, C_in, C_out]; `times` is `size` unless given.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        times: int | None = None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        times = times or size
        init = kaiming_uniform(times * size**2 * channels_in, _GAIN)
        axes = (None, None, None, "channels_in", "channels_out")
        self.kernel = param(rngs, (times, size, size, channels_in, channels_out), init, axes)
        self.bias = param(rngs, (channels_out,), zeros, axes[4:])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels_in] to [B, H, W, channels_out], by the last slice in time."""
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.fetched(lambda w: w.astype(self.dtype))[-1],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + self.bias[...].astype(self.dtype)


class UnitNorm(Module):
    """x sqrt(C) / |x| over the channels, times a learned scale; float32 inside."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (channels,), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to the same; the dtype of `x`."""
        y = x.astype(jnp.float32)
        square = jnp.square(y).sum(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * math.sqrt(x.shape[-1])
        return (y * self.scale[...]).astype(x.dtype)


class Residual(ResidualBlock):
    """Two convolutions, each after a norm and SiLU, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        conv = functools.partial(CausalConv, dtype=dtype, rngs=rngs)
        self.norm1 = UnitNorm(channels_in, rngs=rngs)
        self.conv1 = conv(channels_in, channels_out, 3)
        self.norm2 = UnitNorm(channels_out, rngs=rngs)
        self.conv2 = conv(channels_out, channels_out, 3)
        self.shortcut = None if channels_in == channels_out else conv(channels_in, channels_out, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels_in] to [B, H, W, channels_out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(ResidualBlock):
    """Attention of a frame's pixels to each other, in one head."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(
            Linear, channels, init=kaiming_uniform(channels, _GAIN), dtype=dtype, rngs=rngs
        )
        self.norm = UnitNorm(channels, rngs=rngs)
        self.qkv = linear((3, channels))
        self.attention = Attention(1)
        self.project = linear(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        q, k, v = layers.together(self.norm(x), self.qkv)
        return x + self.project(self.attention(q, k, v))


class Resample(Module):
    """Sides halved or doubled by a convolution; doubling halves the channels.

    If `temporal`, it holds the weights that do so in time to the frames after the first.
    """

    def __init__(
        self, channels: int, *, up: bool, temporal: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.up = up
        init = kaiming_uniform(9 * channels, _GAIN)
        make = {"dtype": dtype, "rngs": rngs}
        # "SAME" pads one pixel at the end alone, as even sides and a stride of 2 need it.
        self.conv = Conv(
            channels, channels // 2 if up else channels, 3, init=init, stride=1 if up else 2, **make
        )
        self.time = CausalConv(channels, channels * (1 + up), 1, 3, **make) if temporal else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, H / 2, W / 2, C] or [B, 2 H, 2 W, C / 2]."""
        return self.conv(layers.upsample(x) if self.up else x)


class Middle(Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.residuals = nnx.List([Residual(channels, channels, **make) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(channels, **make)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        return self.residuals[1](self.attentions[0](self.residuals[0](x)))


class Encoder(Module):
    """Images to features at the latents' size: all blocks in one list, as they follow."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        width: int,
        widths: Sequence[int],
        depth: int,
        temporal: Sequence[bool],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.in_conv = CausalConv(channels_in, width, 3, **make)
        blocks, now = [], width
        for i, wide in enumerate(widths):
            for _ in range(depth):
                blocks.append(Residual(now, wide, **make))
                now = wide
            if i < len(temporal):
                blocks.append(Resample(wide, up=False, temporal=temporal[i], **make))
        self.blocks = nnx.List(blocks)
        self.middle = Middle(now, **make)
        self.out_norm = UnitNorm(now, rngs=rngs)
        self.out_conv = CausalConv(now, channels_out, 3, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels_in] to [B, H / factor, W / factor, channels_out]."""
        x = self.in_conv(x)
        for block in self.blocks:
            x = block(x)
        return self.out_conv(jax.nn.silu(self.out_norm(self.middle(x))))


class Decoder(Module):
    """Latents to images; `widths` from the latents' size on."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        widths: Sequence[int],
        depth: int,
        temporal: Sequence[bool],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.in_conv = CausalConv(channels_in, widths[0], 3, **make)
        self.middle = Middle(widths[0], **make)
        self.sizes = nnx.List([])
        now = widths[0]
        for i, wide in enumerate(widths):
            resample = i < len(temporal)
            self.sizes.append(
                UpSize(now, wide, depth + 1, temporal[i] if resample else None, **make)
            )
            now = wide // 2
        self.out_norm = UnitNorm(wide, rngs=rngs)
        self.out_conv = CausalConv(wide, channels_out, 3, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, channels_in] to [B, h * factor, w * factor, channels_out]."""
        x = self.middle(self.in_conv(x))
        for size in self.sizes:
            x = size(x)
        return self.out_conv(jax.nn.silu(self.out_norm(x)))


class UpSize(Module):
    """The decoder's blocks at one size, and the step to the next; none if `temporal` is None."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        depth: int,
        temporal: bool | None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        widths = (channels_in, *(channels_out,) * depth)
        self.blocks = nnx.List([Residual(a, b, **make) for a, b in zip(widths, widths[1:])])
        self.up = None
        if temporal is not None:
            self.up = Resample(channels_out, up=True, temporal=temporal, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, channels_in] to [B, h or 2 h, w or 2 w, ...]."""
        for block in self.blocks:
            x = block(x)
        return x if self.up is None else self.up(x)
