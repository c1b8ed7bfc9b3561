"""JiT: a plain transformer on large patches of pixels that predicts the clean image.

"Just image Transformers" (Li and He, "Back to Basics", 2025): patches of up to 32 x 32 pixels enter
through a narrow linear layer, since images are near a surface of few dimensions and noise is not;
blocks are adaLN-Zero's with RMSNorm, SwiGLU, normalised queries and keys and rotary positions; and
from some block on the class is also there as tokens of its own. To be used with a parameterisation
whose network predicts x0.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers, rope, stacked
from jdiff.models.attention import Attention
from jdiff.models.dit import patchify, unpatchify
from jdiff.models.dit_blocks import linear
from jdiff.models.initializers import normal, param, zeros
from jdiff.models.layers import RMSNorm, run
from jdiff.models.low_res import METHODS, with_low_res
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.models.scalars import Scalars
from jdiff.parallel import tokens as sequences
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class JiT(Module):
    """A JiT `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` holds "label" (int [B]) if `num_classes`; the index `num_classes` is the null label. H
    and W may be any multiple of `patch`; neighbouring patches are 1 apart in any image. With
    `low_res_channels` it also holds "low_res" [B, h, w, low_res_channels] of any size, which is
    enlarged to H x W and set behind the channels of x. There is no dropout, so `key` has no effect.

    Args:
        in_channels: of x alone, without those of "low_res".
        low_res_method: how that is enlarged: "bilinear", "bicubic" or "nearest".
        patch: side of a patch in pixels.
        bottleneck: channels between the two linear layers that embed a patch.
        width: channels of a token; a multiple of 4 * `heads`.
        depth: number of blocks.
        mlp_ratio: hidden channels of a perceptron without gate; this one has 2/3 of them.
        context: number of class tokens; 0 for none.
        context_start: number of blocks before the class tokens come in.
        scalars: further numbers in `cond`, embedded like t; see `Scalars`.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
        dtype: of the activations; parameters, norms, softmax and the time embedding stay float32.
        scan: stack the blocks and scan over them. They are two stacks: `stack_blocks(params,
            ("blocks", "context_blocks"))` converts weights.
        remat: which of the blocks' activations the backward pass computes again: a policy of
            `jdiff.models.remat`, False for none, True for all.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    rules = TRANSFORMER  # how it is split over devices

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        low_res_channels: int = 0,
        low_res_method: str = "bilinear",
        patch: int = 16,
        bottleneck: int = 128,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        context: int = 0,
        context_start: int = 4,
        scalars: Sequence[str] = (),
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, depth=depth, width=width)
        layers.check_positive(bottleneck=bottleneck)
        layers.check_heads(heads, width, "width")
        if width % (4 * heads):
            raise ValueError(
                f"width={width} must be a multiple of 4 * heads = {4 * heads}: half of a head's "
                "channels turn with the row, half with the column, in pairs"
            )
        if context and not num_classes:
            raise ValueError(f"context={context} tokens of the class need num_classes")
        if context and not 0 < context_start < depth:
            raise ValueError(f"context_start={context_start} must be between 1 and depth - 1")
        self.patch, self.in_channels, self.width, self.heads = patch, in_channels, width, heads
        self.out_channels, self.low_res_channels = out_channels or in_channels, low_res_channels
        self.low_res_method = choose("low_res_method", low_res_method, METHODS)
        self.num_classes, self.context, self.time_scale = num_classes, context, time_scale
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)

        kinds = {"dtype": self.dtype, "rngs": rngs}
        layer = functools.partial(linear, init=normal(0.02), rngs=rngs)
        first = functools.partial(layer, 256, width, axes=(None, "embed"))
        second = functools.partial(layer, width, width, axes=("embed", None))
        table = functools.partial(param, rngs, rule=normal(0.02), axes=(None, "embed"))
        into = patch**2 * (in_channels + low_res_channels)
        self.patches1 = linear(into, bottleneck, bias_init=None, **kinds)
        self.patches2 = linear(bottleneck, width, axes=(None, "embed"), **kinds)
        self.time1, self.time2 = first(), second()
        self.label = table(shape=(num_classes + 1, width)) if num_classes else None
        self.scalars = Scalars(scalars, lambda: (first(), second())) if scalars else None
        self.context_places = table(shape=(context, width)) if context else None
        block = functools.partial(Block, width, heads, int(int(mlp_ratio * width) * 2 / 3))

        def blocks(number: int) -> nnx.Module:
            if scan:
                return stacked.stack(functools.partial(block, dtype=self.dtype), number, rngs)
            return nnx.List([block(**kinds) for _ in range(number)])

        self.blocks = blocks(context_start if context else depth)
        self.context_blocks = blocks(depth - context_start) if context else None
        self.norm = RMSNorm(width, rngs=rngs)
        axes = ("embed", None)
        self.modulation = linear(width, 2 * width, init=zeros, axes=axes, **kinds)
        self.out = linear(width, patch**2 * self.out_channels, init=zeros, axes=axes, **kinds)

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
        c, label = self._embed(t, cond)
        half = self.width // self.heads // 2
        turn = rope.angles(rope.grid(range(rows), range(columns)), (half, half))

        x = with_low_res(self, x, cond, self.low_res_channels, self.low_res_method)
        h = self.patches2(self.patches1(patchify(x, self.patch)))
        h = h + layers.grid_embedding(rows, columns, self.width).astype(self.dtype)
        h = self._run(self.blocks, hold(h), c, turn)
        if self.context_blocks is not None:
            tokens = (label[:, None] + self.context_places[...]).astype(self.dtype)
            tokens, seen = sequences.fill(tokens)
            length = tokens.shape[1]
            mask = sequences.mask(length if seen is None else seen, h.shape[1])
            still = jnp.zeros((1, length, half))  # they have no place
            turn = sequences.join(still, turn[None])[0]
            h = self._run(self.context_blocks, hold(sequences.join(tokens, h)), c, turn, mask)
            _, h = sequences.part(h, length)
        shift, scale = jnp.split(layers.expand(self.modulation(c), h), 2, axis=-1)
        h = self.out(self.norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)

    def _embed(
        self, t: jax.Array, cond: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        """The conditioning of the norms, and the label's embedding: [B, width]."""
        waves = functools.partial(layers.sinusoidal, channels=256, scale=self.time_scale)
        c = self.time2(jax.nn.silu(self.time1(waves(t))))
        if self.scalars is not None:
            c = c + self.scalars(t, cond, waves)
        if self.label is None:
            return jax.nn.silu(c), None
        label = jnp.take(self.label[...], cond["label"], axis=0, mode="fill")
        return jax.nn.silu(c + label), label

    def _run(self, blocks: nnx.Module, h: jax.Array, *inputs: jax.Array | None) -> jax.Array:
        if self.scan:
            return stacked.scan(blocks, h, *inputs, remat=self.remat)
        for block in blocks:
            h = run(block, h, *inputs, remat=self.remat)
        return h


class Block(layers.ResidualBlock):
    """An adaLN-Zero block with RMSNorm, normalised and rotated queries and keys, and SwiGLU."""

    def __init__(self, width: int, heads: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        layer = functools.partial(linear, dtype=dtype, rngs=rngs)
        self.heads = heads
        self.attention = Attention(heads)
        self.modulation = layer(width, 6 * width, init=zeros, axes=("embed", None))
        self.norm1, self.norm2 = RMSNorm(width, rngs=rngs), RMSNorm(width, rngs=rngs)
        self.norm_q = RMSNorm(width // heads, rngs=rngs)
        self.norm_k = RMSNorm(width // heads, rngs=rngs)
        self.qkv = layer(width, (3, width), axes=("embed", None, "heads"))
        self.project = layer(width, width, axes=("heads", "embed"))
        self.mlp1 = layer(width, (2, hidden), axes=("embed", None, "mlp"))
        self.mlp2 = layer(hidden, width, axes=("mlp", "embed"))

    def __call__(
        self, h: jax.Array, c: jax.Array, turn: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Tokens h [B, N, width], c [B, width] and angles [N, D / 2] to tokens like h."""
        vectors = jnp.split(layers.expand(self.modulation(c), h), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        q, k, v = jnp.unstack(self.qkv(self.norm1(h) * (1 + scale1) + shift1), axis=-2)
        q, k = self._place(q, self.norm_q, turn), self._place(k, self.norm_k, turn)
        h = hold(h + gate1 * self.project(self.attention(q, k, v, mask)))
        gate, value = jnp.unstack(self.mlp1(self.norm2(h) * (1 + scale2) + shift2), axis=-2)
        return hold(h + gate2 * self.mlp2(jax.nn.silu(gate) * value))

    def _place(self, q: jax.Array, norm: RMSNorm, turn: jax.Array) -> jax.Array:
        heads = q.reshape(*q.shape[:-1], self.heads, -1)
        return rope.rotate(norm(heads), turn).reshape(q.shape)


SIZES = {
    "B": {"width": 768, "depth": 12, "heads": 12, "bottleneck": 128, "context_start": 4},
    "L": {"width": 1024, "depth": 24, "heads": 16, "bottleneck": 128, "context_start": 8},
    "H": {"width": 1280, "depth": 32, "heads": 16, "bottleneck": 256, "context_start": 10},
}


def jit_imagenet(name: str = "B/16", **changes) -> dict:
    """Fields of a published JiT ("B/16" to "H/32") for class-conditional ImageNet pixels.

    /16 is for images of 256 pixels, /32 for 512 at nearly the same cost. The paper trains the
    largest with dropout, which this network has not.

    Raises:
        ValueError: if there is no such size.
    """
    names = [f"{size}/{patch}" for size in SIZES for patch in (16, 32)]
    if name not in names:
        close = difflib.get_close_matches(str(name).removeprefix("JiT-").upper(), names, n=1)
        raise ValueError(
            f"name={name!r} is none of {names}; the nearest is {(close or names)[0]!r}"
        )
    size, patch = name.split("/")
    return {"num_classes": 1000, "context": 32} | SIZES[size] | {"patch": int(patch)} | changes
