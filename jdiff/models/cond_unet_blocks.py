"""The transformer inside a text-conditional U-Net.

Source: latent diffusion (Rombach et al. 2022, appendix E.2.1) as released for Stable Diffusion.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.initializers import Axes
from jdiff.models.layers import Conv, GroupNorm, LayerNorm, Linear, run
from jdiff.models.module import Module
from jdiff.models.unet_blocks import INITS


class SpatialTransformer(layers.ResidualBlock):
    """Transformer blocks on the pixels of an image, each attending to all pixels and to the text.

    Its last layer starts at zero, so that it starts as the identity.

    Args:
        channels: of the image and of the tokens.
        text_width: channels of the text.
        depth: number of blocks.
        projection: whether the layers into and out of the blocks are stored as "linear" layers or
            as 1 x 1 "conv"olutions; they compute the same.
        groups: of the group normalisation ahead of the blocks.
        cross_only: let the first attention of each block look at the text too, not at the image.
        scan: stack the blocks and scan over them.
        remat: what of the blocks to keep for the backward pass, see `jdiff.models.remat`.
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        depth: int,
        *,
        heads: int,
        projection: Literal["linear", "conv"],
        groups: int | None,
        cross_only: bool = False,
        scan: bool = False,
        remat: bool | str = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.scan, self.remat = scan, remat
        self.norm = GroupNorm(channels, eps=1e-6, groups=groups, rngs=rngs)
        make = functools.partial(_projection, projection, channels, dtype=dtype, rngs=rngs)
        self.project_in = make(("channels_in", "embed"))
        block = functools.partial(
            TransformerBlock, channels, text_width, heads=heads, cross_only=cross_only, dtype=dtype
        )
        self.blocks = stacked.repeated(block, depth, scan=scan, rngs=rngs)
        self.project_out = make(("embed", "channels_out"), zero=True)

    def __call__(self, x: jax.Array, text: jax.Array, mask: jax.Array | None) -> jax.Array:
        """[B, H, W, channels] to the same; text [B, L, text_width], mask bool [B, 1, 1, L]."""
        h = self.project_in(self.norm(x))
        if self.scan:
            h = stacked.scan(self.blocks, h, text, mask, remat=self.remat)
        else:
            for block in self.blocks:
                h = run(block, h, text, mask, remat=self.remat)
        return x + self.project_out(h)


class TransformerBlock(layers.ResidualBlock):
    """Attention to the tokens themselves, attention to the text, and a gated MLP (GEGLU)."""

    def __init__(
        self,
        width: int,
        text_width: int,
        *,
        heads: int,
        cross_only: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.cross_only = cross_only
        attend = functools.partial(MultiHead, width, heads=heads, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(width, rngs=rngs)
        self.self_attention = attend(text_width if cross_only else width, cross=cross_only)
        self.norm2 = LayerNorm(width, rngs=rngs)
        self.cross_attention = attend(text_width, cross=True)
        self.norm3 = LayerNorm(width, rngs=rngs)
        # Two halves: what passes, then its gate.
        self.mlp1 = linear(width, 8 * width, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.mlp2 = linear(4 * width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array, text: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Tokens h [B, *grid, width] and text [B, L, text_width] to tokens like h."""
        y = self.norm1(h)
        if self.cross_only:
            h = h + self.self_attention(y, text, mask)
        else:
            h = h + self.self_attention(y, y, None)
        h = h + self.cross_attention(self.norm2(h), text, mask)
        passed, gate = jnp.split(self.mlp1(self.norm3(h)), 2, axis=-1)
        return h + self.mlp2(passed * jax.nn.gelu(gate, approximate=False))


class MultiHead(Module):
    """Attention with its projections: queries from the tokens, keys and values from a context."""

    def __init__(
        self,
        width: int,
        context_width: int,
        *,
        heads: int,
        cross: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(linear, dtype=dtype, rngs=rngs)
        context_axes = ("text" if cross else "embed", "heads")
        self.q = make(width, width, axes=("embed", "heads"), bias=False)
        self.k = make(context_width, width, axes=context_axes, bias=False)
        self.v = make(context_width, width, axes=context_axes, bias=False)
        self.attention = Attention(heads)
        self.project = make(width, width, axes=("heads", "embed"))

    def __call__(self, h: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Tokens [B, *grid, width] looking at [B, *places, context_width], to tokens like h."""
        q, k, v = self.q(h), self.k(context), self.v(context)
        return self.project(self.attention(q, k, v, mask=mask))


def linear(
    features_in: int,
    features_out: int,
    *,
    axes: Axes,
    bias: bool = True,
    gain: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear layer that starts as PyTorch's does, as the released networks were trained."""
    inits = INITS["adm"]
    rules = {
        "init": inits.kernel(features_in, features_out, gain),
        "bias_init": inits.bias(features_in, gain) if bias else None,
    }
    return Linear(features_in, features_out, **rules, axes=axes, dtype=dtype, rngs=rngs)


def _projection(
    kind: str, channels: int, axes: Axes, *, zero: bool = False, **kwargs
) -> Linear | Conv:
    if kind == "conv":
        return INITS["adm"].conv(channels, channels, 1, zero=zero, **kwargs)
    return linear(channels, channels, axes=axes, gain=0.0 if zero else 1.0, **kwargs)
