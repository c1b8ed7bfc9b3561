"""DiT: a transformer on image patches, conditioned by adaLN-Zero (Peebles and Xie, 2023).

With `learn_sigma` off it is SiT's network (Ma et al., 2024). Blocks are equal, so they can be
stacked and scanned, which makes the compile time independent of the depth.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.initializers import Init, normal, param, xavier_uniform, zeros
from jdiff.models.layers import Linear, layer_norm, run
from jdiff.models.scalars import Scalars


class DiT(nnx.Module):
    """A DiT `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` holds "label" (int [B]) if `num_classes`; the index `num_classes` is the null label. H
    and W may be any multiple of `patch`. There is no dropout, so `key` has no effect.

    Args:
        patch: side of a patch in pixels.
        width: channels of a token; a multiple of 4 and of `heads`.
        depth: number of blocks.
        scalars: further numbers in `cond`, embedded like t; ("t-s",) makes it a flow map. See
            `Scalars`.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
        dtype: of the activations; parameters, norms, softmax and the time embedding stay float32.
        scan: stack the blocks and scan over them; `stack_blocks` converts weights.
        remat: recompute the blocks' activations in the backward pass.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        scalars: Sequence[str] = (),
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, depth=depth, width=width)
        layers.check_heads(heads, width, "width")
        layers.grid_embedding(1, 1, width)  # raises if the width has none
        self.patch, self.in_channels = patch, in_channels
        self.out_channels = out_channels or in_channels
        self.width, self.num_classes, self.time_scale = width, num_classes, time_scale
        dtype = layers.float_dtype(dtype)
        self.dtype, self.scan, self.remat = dtype, scan, remat

        self.embed_patches = _linear(patch**2 * in_channels, width, dtype=dtype, rngs=rngs)
        self.time1 = _linear(256, width, init=normal(0.02), rngs=rngs)
        self.time2 = _linear(width, width, init=normal(0.02), rngs=rngs)
        self.label = param(rngs, (num_classes + 1, width), normal(0.02)) if num_classes else None
        linear = functools.partial(_linear, init=normal(0.02), rngs=rngs)
        pair = lambda: (linear(256, width), linear(width, width))
        self.scalars = Scalars(scalars, pair) if scalars else None
        block = functools.partial(Block, width, heads, int(mlp_ratio * width), dtype=dtype)
        if scan:
            self.blocks = stacked.stack(block, depth, rngs)
        else:
            self.blocks = nnx.List([block(rngs=rngs) for _ in range(depth)])
        self.modulation = _linear(width, 2 * width, init=zeros, dtype=dtype, rngs=rngs)
        features_out = patch**2 * self.out_channels
        self.out = _linear(width, features_out, init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's raw output for noisy images x at noise conditioning t."""
        del key
        layers.check_inputs(
            self,
            x,
            t,
            cond,
            in_channels=self.in_channels,
            multiple=self.patch,
            reason=f"patch={self.patch}",
            num_classes=self.num_classes,
        )
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        waves = functools.partial(layers.sinusoidal, channels=256, scale=self.time_scale)
        c = self.time2(jax.nn.silu(self.time1(waves(t))))
        if self.scalars is not None:
            c = c + self.scalars(t, cond, waves)
        if self.label is not None:
            c = c + jnp.take(self.label[...], cond["label"], axis=0, mode="fill")
        c = jax.nn.silu(c)

        h = self.embed_patches(patchify(x, self.patch))
        h = h + layers.grid_embedding(rows, columns, self.width).astype(self.dtype)
        h = h.reshape(h.shape[0], rows, columns, self.width)
        if self.scan:
            h = stacked.scan(self.blocks, h, c, remat=self.remat)
        else:
            for block in self.blocks:
                h = run(block, h, c, remat=self.remat)
        shift, scale = jnp.split(layers.expand(self.modulation(c), h), 2, axis=-1)
        h = self.out(layer_norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)


class Block(layers.ResidualBlock):
    """A transformer block whose norms are shifted and scaled, and its branches gated, by c.

    The gates start at zero, so that the block starts as the identity (adaLN-Zero).
    """

    def __init__(self, width: int, heads: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(heads)
        linear = functools.partial(_linear, dtype=dtype, rngs=rngs)
        self.modulation = linear(width, 6 * width, init=zeros)
        self.qkv = linear(width, 3 * width)
        self.project = linear(width, width)
        self.mlp1 = linear(width, hidden)
        self.mlp2 = linear(hidden, width)

    def __call__(self, h: jax.Array, c: jax.Array) -> jax.Array:
        """Tokens h [B, *grid, width] and conditioning c [B, width] to tokens like h."""
        modulation = jnp.split(layers.expand(self.modulation(c), h), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = layer_norm(h) * (1 + scale1) + shift1
        q, k, v = jnp.split(self.qkv(y), 3, axis=-1)
        h = h + gate1 * self.project(self.attention(q, k, v))
        y = layer_norm(h) * (1 + scale2) + shift2
        return h + gate2 * self.mlp2(jax.nn.gelu(self.mlp1(y), approximate=True))


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] to tokens [B, H / p * W / p, p * p * C], row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: jax.Array, patch: int, rows: int, columns: int) -> jax.Array:
    """The inverse of `patchify`, for a grid of rows x columns patches."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch, columns * patch, -1)


def stack_blocks(params: dict) -> dict:
    """Weights of a `scan=False` DiT for the same network with `scan=True`."""
    blocks = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
    return params | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: dict) -> dict:
    """Weights of a `scan=True` DiT for the same network with `scan=False`."""
    leaves, structure = jax.tree.flatten(params["blocks"])
    depth = leaves[0].shape[0]
    blocks = {str(i): structure.unflatten([leaf[i] for leaf in leaves]) for i in range(depth)}
    return params | {"blocks": blocks}


SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}


def dit_imagenet(name: str = "XL/2", *, learn_sigma: bool = True, **changes) -> dict:
    """Fields of a published DiT ("S/8" to "XL/2") for class-conditional ImageNet latents.

    The latents have 4 channels; `learn_sigma` doubles the output's, as in DiT and not in SiT.

    Raises:
        ValueError: if there is no such size.
    """
    names = [f"{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
    if name not in names:
        close = difflib.get_close_matches(str(name).removeprefix("DiT-").upper(), names, n=1)
        raise ValueError(
            f"name={name!r} is none of {names}; the nearest is {(close or names)[0]!r}"
        )
    size, patch = name.split("/")
    fields = {"in_channels": 4, "out_channels": 8 if learn_sigma else 4, "num_classes": 1000}
    return fields | SIZES[size] | {"patch": int(patch)} | changes


def _linear(features_in: int, features_out: int, *, init: Init | None = None, **kwargs) -> Linear:
    init = init or xavier_uniform(features_in, features_out)
    return Linear(features_in, features_out, init=init, **kwargs)
