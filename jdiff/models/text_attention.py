"""Text in pixel U-Nets: a pooled vector, and attention of pixels to its tokens.

Saharia et al. 2022 (Imagen), section 2.1 and appendix D.3.1.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.initializers import Axes, kaiming_uniform, zeros
from jdiff.models.layers import GroupNorm, LayerNorm, Linear
from jdiff.models.module import Module


def text_input(
    network: nnx.Module, x: jax.Array, cond: Mapping[str, jax.Array], text_width: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """cond["text"] and cond["text_mask"] (None if absent) for images x; no text, no `text_width`.

    Raises:
        ValueError: if the text is missing, or either has another shape.
    """
    if not text_width:
        return None, None
    text = layers.entry(network, cond, "text", (x.shape[0], "L", text_width))
    if "text_mask" not in cond:
        return text, None
    return text, layers.entry(network, cond, "text_mask", text.shape[:2])


class TextPool(Module):
    """Attention pooling: the mean of the tokens asks, the tokens answer; [B, L, D] to [B, width].

    Tokens are normalised first, which Imagen's section 2.1 found to matter.
    """

    def __init__(self, text_width: int, width: int, heads: int, *, rngs: nnx.Rngs):
        layers.check_heads(heads, width, "the width of the pooled text")
        make = functools.partial(linear, rngs=rngs)
        self.norm = LayerNorm(text_width, rngs=rngs)
        self.q = make(text_width, width, axes=("text", "heads"))
        self.kv = make(text_width, 2 * width, axes=("text", "heads"))
        self.out = make(width, width, axes=("heads", None))
        self.attention = Attention(heads)

    def __call__(self, text: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The vector of each text, float32; tokens where `mask` [B, L] is False do not count."""
        tokens = self.norm(text.astype(jnp.float32))
        seen = jnp.ones(text.shape[:2]) if mask is None else mask.astype(jnp.float32)
        mean = (tokens * seen[..., None]).sum(axis=1) / jnp.maximum(seen.sum(axis=1), 1)[:, None]
        k, v = jnp.split(self.kv(tokens), 2, axis=-1)
        places = None if mask is None else mask[:, None, None, :]
        return self.out(self.attention(self.q(mean)[:, None], k, v, places)[:, 0])


class TextKeys(Module):
    """The keys and values of a text's tokens, set behind those of the pixels."""

    def __init__(self, text_width: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(text_width, rngs=rngs)
        self.kv = linear(text_width, 2 * width, axes=("text", "heads"), dtype=dtype, rngs=rngs)

    def __call__(
        self, pairs: jax.Array | None, text: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Keys and values [B, places, 2 width] and where attention may look, for `Attention`.

        Args:
            pairs: the pixels' keys and values [B, *grid, 2 width], None for the text's alone.
            text: [B, L, text_width].
            mask: of its tokens [B, L], True for those to see; None for all.
        """
        pixels = 0 if pairs is None else math.prod(pairs.shape[1:-1])
        both = self.kv(self.norm(text))
        if pairs is not None:
            pairs = pairs.reshape(pairs.shape[0], pixels, -1)
            both = jnp.concatenate([pairs, both], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (pixels, 0)), constant_values=True)[:, None, None, :]
        return both, mask


class PixelAttention(layers.ResidualBlock):
    """Pixels attend to pixels, to the tokens of a text, or to both in one softmax.

    Keys and values of the text stand behind those of the pixels. Queries, keys and values are twice
    as wide as the pixels (Imagen, figure A.28).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        to_pixels: bool,
        text_width: int,
        scale: float,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        hidden = 2 * channels
        layers.check_heads(heads, hidden, "twice the width of a level")
        self.scale = scale
        make = functools.partial(linear, dtype=dtype, rngs=rngs)
        axes = ("channels_in", "heads")
        self.norm = GroupNorm(channels, eps=eps, rngs=rngs)
        self.q = make(channels, hidden, axes=axes)
        self.kv = make(channels, 2 * hidden, axes=axes) if to_pixels else None
        self.text = TextKeys(text_width, hidden, dtype=dtype, rngs=rngs) if text_width else None
        self.attention = Attention(heads)
        self.project = make(hidden, channels, gain=0.0, axes=("heads", "channels_out"))

    def __call__(self, h: jax.Array, text: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """[B, H, W, channels] to the same; `text` [B, L, D] and its `mask` [B, L] or None."""
        y = self.norm(h)
        pairs = None if self.kv is None else self.kv(y)
        pairs, places = (pairs, None) if self.text is None else self.text(pairs, text, mask)
        k, v = jnp.split(pairs, 2, axis=-1)
        return (h + self.project(self.attention(self.q(y), k, v, places))) * self.scale


def linear(
    features_in: int, features_out: int, *, gain: float = 1.0, axes: Axes, **kwargs
) -> Linear:
    """PyTorch's default, which ADM starts from, with biases of zero; `gain` 0 ends a branch."""
    init = kaiming_uniform(features_in, gain * (1 / 3) ** 0.5)
    return Linear(features_in, features_out, init=init, bias_init=zeros, axes=axes, **kwargs)
