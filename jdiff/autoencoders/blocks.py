"""The convolutional encoder and decoder of latent diffusion, which several families share.

Source: Rombach et al. 2022, appendix E.1 (after Esser et al. 2021), as the LDM code and diffusers
write it: residual blocks a level, a strided convolution or one after repeating pixels between the
levels, and a middle at the lowest resolution that attends with one head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.layers import GroupNorm, Linear
from jdiff.models.module import Module
from jdiff.models.unet_blocks import INITS, ConvResample

#: Convolutions as PyTorch draws them: no branch begins at zero.
_conv = INITS["adm"].conv
_EPS = 1e-6


class Block(layers.ResidualBlock):
    """x + f(x), f: norm, silu, 3 x 3 convolution, and again; x is projected if the width changes.

    Of `groups` group normalisations, or as many as `layers.GroupNorm` says.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        groups: int | None = 32,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
        norm = functools.partial(GroupNorm, eps=_EPS, groups=groups, rngs=rngs)
        self.norm1 = norm(channels_in)
        self.conv1 = conv(channels_in, channels_out, 3)
        self.norm2 = norm(channels_out)
        self.conv2 = conv(channels_out, channels_out, 3)
        self.skip = conv(channels_in, channels_out, 1) if channels_in != channels_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels_in] to [B, H, W, channels_out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.skip is None else self.skip(x))


class Attending(layers.ResidualBlock):
    """x + attention of all pixels to all, with one head, of the normalised x."""

    def __init__(
        self,
        channels: int,
        *,
        groups: int | None = 32,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = INITS["adm"].kernel(channels, channels)
        linear = functools.partial(
            Linear, channels, channels, init=init, bias_init=init, dtype=dtype, rngs=rngs
        )
        self.norm = GroupNorm(channels, eps=_EPS, groups=groups, rngs=rngs)
        self.q, self.k, self.v, self.project = linear(), linear(), linear(), linear()
        self.attention = Attention(heads=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels] to the same."""
        h = self.norm(x)
        return x + self.project(self.attention(self.q(h), self.k(h), self.v(h)))


class Level(Module):
    """The residual blocks of one resolution, and what leads to the next, if any."""

    def __init__(self, blocks: list[Block], resample: ConvResample | None):
        self.blocks, self.resample = nnx.List(blocks), resample

    def __call__(self, h: jax.Array, remat: bool | str) -> jax.Array:
        """[B, H, W, C] to the next level's; `remat` as for `layers.run`."""
        for block in self.blocks:
            h = layers.run(block, h, remat=remat)
        return h if self.resample is None else self.resample(h)


class Middle(Module):
    """A residual block, attention unless there is to be none, and a residual block."""

    def __init__(self, channels: int, attention: bool, *, rngs: nnx.Rngs, **kwargs: Any):
        blocks = [Block(channels, channels, rngs=rngs, **kwargs) for _ in range(2)]
        self.blocks = nnx.List(blocks)
        self.attention = Attending(channels, rngs=rngs, **kwargs) if attention else None

    def __call__(self, h: jax.Array, remat: bool | str) -> jax.Array:
        """[B, H, W, channels] to the same; `remat` as for `layers.run`."""
        first, second = self.blocks
        for block in (first, self.attention, second):
            h = h if block is None else layers.run(block, h, remat=remat)
        return h


class Encoder(Module):
    """[B, H, W, channels_in] to [B, H / f, W / f, channels_out], f = 2^(levels - 1).

    Args:
      channels_in: of the image.
      channels_out: of the result: twice the latents' for a distribution.
      widths: channels of the levels, from the full resolution down.
      blocks: residual blocks a level.
      attention: whether the middle attends.
      groups: of the normalisations; None: min(32, channels / 4), or the next smaller divisor.
      dtype: of the activations.
      remat: what the backward pass keeps, see `jdiff.models.remat`.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        widths: Sequence[int],
        blocks: int,
        attention: bool = True,
        groups: int | None = 32,
        dtype: jnp.dtype = jnp.float32,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        self.remat = remat
        conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
        block = functools.partial(Block, groups=groups, dtype=dtype, rngs=rngs)
        width = widths[0]
        self.stem = conv(channels_in, width, 3)
        levels = []
        for n, wide in enumerate(widths):
            made = [block(width if m == 0 else wide, wide) for m in range(blocks)]
            # "SAME" pads after an even image only, as these networks do.
            down = ConvResample("down", conv(wide, wide, 3, stride=2))
            levels.append(Level(made, down if n < len(widths) - 1 else None))
            width = wide
        self.levels = nnx.List(levels)
        self.middle = Middle(width, attention, groups=groups, dtype=dtype, rngs=rngs)
        self.out_norm = GroupNorm(width, eps=_EPS, groups=groups, rngs=rngs)
        self.out_conv = conv(width, channels_out, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output of the last convolution, in `dtype`."""
        h = self.stem(x)
        for level in self.levels:
            h = level(h, self.remat)
        h = self.middle(h, self.remat)
        return self.out_conv(jax.nn.silu(self.out_norm(h)))


class Decoder(Module):
    """[B, h, w, channels_in] to [B, h f, w f, channels_out], f = 2^(levels - 1).

    The arguments are those of `Encoder`: `widths` still from the full resolution down. A level has
    a block more than the encoder's.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        widths: Sequence[int],
        blocks: int,
        attention: bool = True,
        groups: int | None = 32,
        dtype: jnp.dtype = jnp.float32,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        self.remat = remat
        conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
        block = functools.partial(Block, groups=groups, dtype=dtype, rngs=rngs)
        width = widths[-1]
        self.stem = conv(channels_in, width, 3)
        self.middle = Middle(width, attention, groups=groups, dtype=dtype, rngs=rngs)
        levels = []
        for n, wide in enumerate(reversed(widths)):
            made = [block(width if m == 0 else wide, wide) for m in range(blocks + 1)]
            up = ConvResample("up", conv(wide, wide, 3))
            levels.append(Level(made, up if n < len(widths) - 1 else None))
            width = wide
        self.levels = nnx.List(levels)
        self.out_norm = GroupNorm(width, eps=_EPS, groups=groups, rngs=rngs)
        self.out_conv = conv(width, channels_out, 3)

    def __call__(self, z: jax.Array) -> jax.Array:
        """The output of the last convolution, in `dtype`."""
        h = self.middle(self.stem(z), self.remat)
        for level in self.levels:
            h = level(h, self.remat)
        return self.out_conv(jax.nn.silu(self.out_norm(h)))
