"""Two towers, of images and of texts, that end in one space of unit vectors.

The text tower stands on the states of a frozen text encoder, which the data hold (`jdiff encode
--text=minilm`): what is learnt is small, and names that training has not seen are still understood.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.contrastive.loss import SCALE, unit
from jdiff.models import layers
from jdiff.models.dit_blocks import InContext
from jdiff.models.initializers import Init, kaiming_uniform, param
from jdiff.models.layers import Conv, GroupNorm, LayerNorm
from jdiff.models.module import Module
from jdiff.models.text_attention import TextPool, linear


class TwoTowers(Module):
    """Images and texts as unit vectors of one space, `[B, dim]` each, and a learned temperature.

    `image(x)` takes images `[B, H, W, C]` in [-1, 1]; `text(cond)` takes "text" `[B, L,
    text_width]`, with "text_mask" bool `[B, L]` if some of it is padding, and "pooled" `[B,
    pooled_width]`, whichever of them have a width. `log_scale` is log(1 / temperature).

    The image tower is convolutional with group norms, as in the pixel U-Nets: of some ten thousand
    pictures it learns more than a vision transformer. Attention pooling ends it, as the ResNets of
    Radford et al. 2021 (section 2.4).

    Args:
        dim: of the space.
        image_size: side of the images, or None for any; H and W are multiples of
            stem * 2^(levels - 1).
        channels: of the first level, multiplied by `multipliers` at each.
        stem: side of the patches that the first convolution makes pixels of.
        blocks: residual blocks a level.
        text_depth: transformer blocks over the text's states, of `text_tokens` channels.
        dropout: of the texts' states, in training.
        dtype: of the image tower's activations; vectors are float32.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        image_size: int | None = None,
        dim: int = 256,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        stem: int = 4,
        blocks: int = 2,
        text_width: int = 0,
        pooled_width: int = 0,
        text_tokens: int = 256,
        text_depth: int = 2,
        dropout: float = 0.0,
        dtype: str | jnp.dtype = "float32",
        rngs: nnx.Rngs,
    ):
        layers.check_positive(dim=dim, channels=channels, stem=stem, blocks=blocks)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.multiple = stem * 2 ** (len(multipliers) - 1)
        if image_size is not None and image_size % self.multiple:
            raise ValueError(f"image_size={image_size} must be a multiple of {self.multiple}")
        self.in_channels, self.dropout = in_channels, dropout
        self.image_size, self.dtype = image_size, layers.float_dtype(dtype)
        kinds = {"dtype": self.dtype, "rngs": rngs}
        widths = [channels * multiplier for multiplier in multipliers]
        self.stem = conv(in_channels, widths[0], stem, stride=stem, padding=0, **kinds)
        stages, now = [], widths[0]
        for width in widths:
            stages.append(nnx.List([Block(a, width, **kinds)
                                    for a in (now, *[width] * (blocks - 1))]))  # fmt: skip
            now = width
        self.stages = nnx.List(stages)
        self.norm = GroupNorm(now, eps=1e-6, rngs=rngs)
        heads = max(1, dim // 64)
        self.pool = TextPool(now, dim, heads, rngs=rngs)
        self.reader = reader(text_width, dim, text_tokens, text_depth, rngs)
        self.pooled_width = pooled_width
        axes = (None, "embed")
        self.pooled = linear(pooled_width, dim, axes=axes, rngs=rngs) if pooled_width else None
        if self.reader is None and self.pooled is None:
            raise ValueError("text_width=0 and pooled_width=0: there is nothing to tell texts by")
        self.log_scale = param(rngs, (), Init("constant", math.log(SCALE)))

    def image(self, x: jax.Array) -> jax.Array:
        """Unit vectors `[B, dim]` of images `[B, H, W, C]` in [-1, 1]."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels or any(
            n % self.multiple or n < self.multiple for n in x.shape[1:3]
        ):  # fmt: skip
            raise ValueError(
                f"TwoTowers takes images [B, H, W, {self.in_channels}], H and W multiples of "
                f"{self.multiple}, not {list(x.shape)}"
            )
        h = self.stem(x)
        for level, stage in enumerate(self.stages):
            h = layers.downsample(h) if level else h
            for block in stage:
                h = block(h)
        h = jax.nn.silu(self.norm(h))
        rows, columns, width = h.shape[1:]
        places = layers.grid_embedding(rows, columns, width)
        return unit(self.pool(h.reshape(len(h), -1, width) + places, None))

    def text(self, cond: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Unit vectors `[B, dim]` of texts; with a `key`, some of their states are dropped."""
        found = 0.0
        keys = (None, None) if key is None else jax.random.split(key)
        if self.reader is not None:
            found = self.reader(self, cond, lambda x: layers.dropout(x, self.dropout, keys[0]))
        if self.pooled is not None:
            pooled = layers.entry(self, cond, "pooled", ("B", self.pooled_width))
            found = found + self.pooled(layers.dropout(pooled, self.dropout, keys[1]))
        return unit(found)

    def pair(
        self, x: jax.Array, cond: Mapping[str, jax.Array], key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(vectors of images, of texts, 1 / temperature): what the loss takes."""
        return self.image(x), self.text(cond, key), jnp.exp(self.log_scale[...])


class Block(layers.ResidualBlock):
    """h + conv(silu(norm(conv(silu(norm(h)))))): a residual block without further inputs."""

    def __init__(self, channels_in: int, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(channels_in, eps=1e-6, rngs=rngs)
        self.conv1 = conv(channels_in, channels, 3, **kinds)
        self.norm2 = GroupNorm(channels, eps=1e-6, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, gain=0.1, **kinds)
        self.skip = conv(channels_in, channels, 1, **kinds) if channels_in != channels else None

    def __call__(self, h: jax.Array) -> jax.Array:
        """[B, H, W, channels_in] to [B, H, W, channels]."""
        y = self.conv1(jax.nn.silu(self.norm1(h)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (h if self.skip is None else self.skip(h))


class Reader(Module):
    """The states of a text's tokens to one vector: transformer blocks, then attention pooling."""

    def __init__(self, text_width: int, dim: int, width: int, depth: int, rngs: nnx.Rngs):
        heads = max(1, width // 64)
        layers.check_heads(heads, width, "text_tokens")
        self.text_width = text_width
        self.norm = LayerNorm(text_width, rngs=rngs)
        self.enter = linear(text_width, width, axes=("text", "embed"), rngs=rngs)
        block = functools.partial(InContext, width, heads, 4 * width, dtype=jnp.float32, rngs=rngs)
        self.blocks = nnx.List([block() for _ in range(depth)])
        self.pool = TextPool(width, dim, max(1, dim // 64), rngs=rngs)

    def __call__(self, network: Module, cond: Mapping[str, jax.Array], change) -> jax.Array:
        """[B, dim] of cond["text"] and its mask; `change` of the states as they come in."""
        text = layers.entry(network, cond, "text", ("B", "L", self.text_width))
        mask = None
        if "text_mask" in cond:
            mask = layers.entry(network, cond, "text_mask", text.shape[:2])
        h = self.enter(change(self.norm(text.astype(jnp.float32))))
        for block in self.blocks:
            h = block(h, None if mask is None else mask[:, None, None, :])
        return self.pool(h, mask)


def reader(
    text_width: int, dim: int, width: int, depth: int, rngs: nnx.Rngs
) -> Reader | None:  # fmt: skip
    """A `Reader`, or None without states to read."""
    return Reader(text_width, dim, width, depth, rngs) if text_width else None


def conv(channels_in: int, channels_out: int, size: int, *, gain: float = 1.0, **kinds) -> Conv:
    """A convolution whose output has the variance of its input, times gain^2."""
    return Conv(
        channels_in, channels_out, size, init=kaiming_uniform(channels_in * size**2, gain), **kinds
    )
