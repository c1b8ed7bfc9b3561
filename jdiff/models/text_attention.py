"""Text in pixel U-Nets: a pooled vector, and attention of pixels to its tokens.

Saharia et al. 2022 (Imagen), section 2.1 and appendix D.3.1.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.initializers import Axes, kaiming_uniform, zeros
from jdiff.models.layers import GroupNorm, LayerNorm, Linear


class TextPool(nnx.Module):
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
        self.text_norm = LayerNorm(text_width, rngs=rngs) if text_width else None
        text_axes = ("text", "heads")
        self.text_kv = make(text_width, 2 * hidden, axes=text_axes) if text_width else None
        self.attention = Attention(heads)
        self.project = make(hidden, channels, gain=0.0, axes=("heads", "channels_out"))

    def __call__(self, h: jax.Array, text: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """[B, H, W, channels] to the same; `text` [B, L, D] and its `mask` [B, L] or None."""
        y = self.norm(h)
        pairs = [] if self.kv is None else [_places(self.kv(y))]
        if self.text_kv is not None:
            pairs.append(self.text_kv(self.text_norm(text)))
        k, v = jnp.split(jnp.concatenate(pairs, axis=1), 2, axis=-1)
        places = None
        if self.text_kv is not None and mask is not None:
            pixels = k.shape[1] - mask.shape[1]
            places = jnp.pad(mask, ((0, 0), (pixels, 0)), constant_values=True)[:, None, None, :]
        return (h + self.project(self.attention(self.q(y), k, v, places))) * self.scale


def linear(
    features_in: int, features_out: int, *, gain: float = 1.0, axes: Axes, **kwargs
) -> Linear:
    """PyTorch's default, which ADM starts from, with biases of zero; `gain` 0 ends a branch."""
    init = kaiming_uniform(features_in, gain * (1 / 3) ** 0.5)
    return Linear(features_in, features_out, init=init, bias_init=zeros, axes=axes, **kwargs)


def _places(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])
