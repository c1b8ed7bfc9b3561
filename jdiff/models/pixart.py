"""PixArt-alpha and -sigma: a DiT told what to draw by text (Chen et al. 2023, 2024).

Each block attends to itself, then to the text, and ends with a perceptron. Its norms and gates are
adaLN-single (section 2.3): one linear map of t's embedding gives six vectors for all blocks, and
each block adds a small table of its own.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.models import layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.dit import check_image_size, grid_spacing, patchify, unpatchify
from jdiff.models.dit_blocks import linear
from jdiff.models.initializers import normal, param, zeros
from jdiff.models.layers import layer_norm, run, together
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class PixArt(Module):
    """A PixArt `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` holds "text" `[B, L, text_width]`, optionally "text_mask" (bool `[B, L]`, True for
    text), and with `micro_conditions` "resolution" `[B, 2]` (height and width in pixels) and
    "aspect_ratio" `[B]` (height / width). There is no dropout, so `key` has no effect.

    Args:
        patch: side of a patch in pixels.
        width: channels of a token; a multiple of 4 and of `heads`, and of 3 for `micro_conditions`.
        depth: number of blocks.
        text_width: channels of the text embeddings (4096 for T5-XXL).
        image_size: side of the training images; positions in others are spread over its grid.
        interpolation: positions are divided by it: the ratio of `image_size` to that of the first
            training stage (64), as section 2 of the sigma paper interpolates them.
        micro_conditions: whether the size and shape of the picture are conditions (alpha at 1024).
        time_scale: multiplies t ahead of its embedding.
        dtype: of the activations; parameters, norms, softmax and the time embedding stay float32.
        scan: stack the blocks and scan over them; `stack_blocks` converts weights.
        remat: which of the blocks' activations the backward pass computes again: a policy of
            `jdiff.models.remat`, False for none, True for all.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    rules = TRANSFORMER  # how it is split over devices

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        text_width: int = 4096,
        image_size: int = 64,
        interpolation: float = 1.0,
        micro_conditions: bool = False,
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, depth=depth, width=width)
        layers.check_positive(text_width=text_width, interpolation=interpolation)
        layers.check_heads(heads, width, "width")
        layers.grid_embedding(1, 1, width)  # raises if the width has none
        check_image_size(image_size, patch)
        if micro_conditions and width % 3:
            raise ValueError(f"width={width} must be a multiple of 3 for micro_conditions")
        self.patch, self.in_channels, self.width = patch, in_channels, width
        self.out_channels = out_channels or in_channels
        self.text_width, self.time_scale = text_width, time_scale
        self.image_size, self.interpolation = image_size, interpolation
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)

        kinds = {"dtype": self.dtype, "rngs": rngs}
        small = functools.partial(linear, init=normal(0.02), rngs=rngs)
        pair = lambda n: nnx.List(
            [small(256, n, axes=(None, "embed")), small(n, n, axes=("embed", None))]
        )
        self.embed_patches = linear(patch**2 * in_channels, width, axes=(None, "embed"), **kinds)
        self.time = pair(width)
        self.resolution = pair(width // 3) if micro_conditions else None
        self.aspect_ratio = pair(width // 3) if micro_conditions else None
        self.modulation = small(width, 6 * width, axes=("embed", None), dtype=self.dtype)
        self.text1 = small(text_width, width, axes=("text", "embed"), dtype=self.dtype)
        self.text2 = small(width, width, axes=("embed", None), dtype=self.dtype)
        block = functools.partial(Block, width, heads, int(mlp_ratio * width), dtype=self.dtype)
        self.blocks = stacked.repeated(block, depth, scan=scan, rngs=rngs)
        self.table = param(rngs, (2, width), normal(width**-0.5), (None, "embed"))
        axes = ("embed", None)
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
            num_classes=0,
        )
        mask = self._check_text(cond, x.shape[0])
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        c = self._embed(t, cond)
        vectors = self.modulation(jax.nn.silu(c)).reshape(-1, 6, self.width)
        text = self.text2(jax.nn.gelu(self.text1(cond["text"]), approximate=True))

        h = self.embed_patches(patchify(x, self.patch))
        spacing = grid_spacing(rows, columns, self.image_size, self.patch)
        spacing = tuple(step / self.interpolation for step in spacing)
        h = h + layers.grid_embedding(rows, columns, self.width, spacing).astype(self.dtype)
        h = hold(h.reshape(h.shape[0], rows, columns, self.width))
        inputs = (vectors, text) if mask is None else (vectors, text, mask[:, None, None, :])
        if self.scan:
            h = stacked.scan(self.blocks, h, *inputs, remat=self.remat)
        else:
            for block in self.blocks:
                h = run(block, h, *inputs, remat=self.remat)
        shift, scale = (
            layers.expand(row, h) for row in _rows(self.table[...] + c[:, None], self.dtype)
        )
        h = self.out(layer_norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)

    def _embed(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> jax.Array:
        """The embedding of t and of the micro-conditions, [B, width]."""

        def waves(pair: nnx.List, number: jax.Array, scale: float = 1.0) -> jax.Array:
            return pair[1](jax.nn.silu(pair[0](layers.sinusoidal(number, 256, scale=scale))))

        c = waves(self.time, t, self.time_scale)
        if self.resolution is None:
            return c
        resolution = _condition(cond, "resolution", (t.shape[0], 2))
        ratio = _condition(cond, "aspect_ratio", t.shape)
        sides = [waves(self.resolution, resolution[:, axis]) for axis in (0, 1)]
        return c + jnp.concatenate([*sides, waves(self.aspect_ratio, ratio)], axis=-1)

    def _check_text(self, cond: Mapping[str, jax.Array], batch: int) -> jax.Array | None:
        """The mask of the text, if there is one."""
        text = cond.get("text")
        if text is None or text.ndim != 3 or text.shape[::2] != (batch, self.text_width):
            given = f"cond has {sorted(cond)}" if text is None else f"not {list(text.shape)}"
            raise ValueError(
                f"PixArt needs cond['text'] of shape [B, L, text_width] = "
                f"[{batch}, L, {self.text_width}]; {given}"
            )
        mask = cond.get("text_mask")
        if mask is not None and (mask.shape != text.shape[:2] or mask.dtype != bool):
            raise ValueError(
                f"PixArt takes cond['text_mask'] as bool [B, L] = {list(text.shape[:2])}, "
                f"not {mask.dtype} {list(mask.shape)}"
            )
        return mask


class Block(layers.ResidualBlock):
    """Self-attention, attention to the text, perceptron; the first and last are adaLN-single."""

    def __init__(self, width: int, heads: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        layer = functools.partial(linear, dtype=dtype, rngs=rngs)
        into = functools.partial(layer, width, width, axes=("embed", "heads"))
        back = functools.partial(layer, width, width, axes=("heads", "embed"))
        self.dtype = dtype
        self.table = param(rngs, (6, width), normal(width**-0.5), (None, "embed"))
        self.attention, self.cross_attention = Attention(heads), Attention(heads)
        self.q, self.k, self.v, self.project = into(), into(), into(), back()
        self.cross_q, self.cross_k, self.cross_v = into(), into(), into()
        self.cross_project = back(init=zeros)
        self.mlp1 = layer(width, hidden, axes=("embed", "mlp"))
        self.mlp2 = layer(hidden, width, axes=("mlp", "embed"))

    def __call__(
        self, h: jax.Array, vectors: jax.Array, text: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Tokens h [B, *grid, width], vectors [B, 6, width] and text [B, L, width] to ones like h.

        The text meets h as it is: this norm is left out, in the published code too.
        """
        rows = _rows(self.table[...] + vectors, self.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = (layers.expand(row, h) for row in rows)
        y = layer_norm(h) * (1 + scale1) + shift1
        h = hold(h + gate1 * self.project(self.attention(*together(y, self.q, self.k, self.v))))
        k, v = together(text, self.cross_k, self.cross_v)
        h = hold(h + self.cross_project(self.cross_attention(self.cross_q(h), k, v, mask)))
        y = layer_norm(h) * (1 + scale2) + shift2
        return hold(h + gate2 * self.mlp2(jax.nn.gelu(self.mlp1(y), approximate=True)))


def pixart_alpha(image_size: int = 1024, **changes) -> dict:
    """Fields of PixArt-alpha XL/2 for pictures of 256, 512 or 1024 pixels, a latent 1/8 of it.

    At 1024 it is also told the picture's size and shape.

    Raises:
        ValueError: if there is no such network.
    """
    if image_size not in (256, 512, 1024):
        raise ValueError(f"image_size={image_size} is none of 256, 512, 1024")
    return _xl(image_size) | {"micro_conditions": image_size == 1024} | changes


def pixart_sigma(image_size: int = 1024, **changes) -> dict:
    """Fields of PixArt-sigma XL/2 for pictures of 256 to 2048 pixels, a latent 1/8 of it.

    Without the key-value compression of the paper's section 3.2, which the published 2048-pixel
    weights have.

    Raises:
        ValueError: if there is no such network.
    """
    if image_size not in (256, 512, 1024, 2048):
        raise ValueError(f"image_size={image_size} is none of 256, 512, 1024, 2048")
    return _xl(image_size) | changes


def _xl(pixels: int) -> dict:
    side = pixels // 8
    return {"out_channels": 8, "image_size": side, "interpolation": float(max(side // 64, 1))}


def _rows(table: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """[B, N, width] as N arrays [B, width]."""
    return [table[:, i].astype(dtype) for i in range(table.shape[1])]


def _condition(cond: Mapping[str, jax.Array], name: str, shape: tuple[int, ...]) -> jax.Array:
    if name not in cond or np.shape(cond[name]) != shape:
        given = f"not {list(np.shape(cond[name]))}" if name in cond else f"cond has {sorted(cond)}"
        raise ValueError(
            f"PixArt with micro_conditions needs cond[{name!r}], numbers of shape {list(shape)}; "
            f"{given}"
        )
    return jnp.asarray(cond[name])
