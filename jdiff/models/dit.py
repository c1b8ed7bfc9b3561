"""DiT: a transformer on image patches, conditioned by adaLN-Zero (Peebles and Xie, 2023).

The field `block` picks one of the paper's other ways of conditioning. With `learn_sigma` off it is
SiT's network (Ma et al., 2024). Blocks are equal, so they can be stacked and scanned, which makes
the compile time independent of the depth.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers, stacked
from jdiff.models.dit_blocks import BLOCKS, linear
from jdiff.models.initializers import normal, param, zeros
from jdiff.models.layers import LayerNorm, layer_norm, run
from jdiff.models.low_res import METHODS, with_low_res
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.models.scalars import Scalars
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class DiT(Module):
    """A DiT `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` holds "label" (int [B]) if `num_classes`; the index `num_classes` is the null label. H
    and W may be any multiple of `patch`. With `low_res_channels` it also holds "low_res" [B, h, w,
    low_res_channels] of any size, which is enlarged to H x W and set behind the channels of x.
    There is no dropout, so `key` has no effect.

    Args:
        in_channels: of x alone, without those of "low_res".
        low_res_method: how that is enlarged: "bilinear", "bicubic" or "nearest".
        patch: side of a patch in pixels.
        width: channels of a token; a multiple of 4 and of `heads`.
        depth: number of blocks.
        block: how the blocks are told t and the label: "adaln_zero", "adaln", "cross_attention" or
            "in_context" (`jdiff.models.dit_blocks`).
        image_size: side of the training images; positions in others are spread over its grid. If
            None, neighbouring patches are 1 apart in any image. Either way, other sizes are
            positions that training did not see: what is trained on crops is best convolutional.
        scalars: further numbers in `cond`, embedded like t; ("t-s",) makes it a flow map. See
            `Scalars`.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
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
        in_channels: int = 3,
        out_channels: int | None = None,
        low_res_channels: int = 0,
        low_res_method: str = "bilinear",
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        block: str = "adaln_zero",
        num_classes: int = 0,
        image_size: int | None = None,
        scalars: Sequence[str] = (),
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, depth=depth, width=width)
        layers.check_heads(heads, width, "width")
        layers.grid_embedding(1, 1, width)  # raises if the width has none
        check_image_size(image_size, patch)
        self.patch, self.in_channels, self.image_size = patch, in_channels, image_size
        self.out_channels, self.low_res_channels = out_channels or in_channels, low_res_channels
        self.low_res_method = choose("low_res_method", low_res_method, METHODS)
        self.width, self.num_classes, self.time_scale = width, num_classes, time_scale
        dtype = layers.float_dtype(dtype)
        self.dtype, self.scan, self.remat = dtype, scan, named(remat)
        self.block, more = self.find_block(block)

        kinds = {"dtype": dtype, "rngs": rngs}
        axes = (None, "embed")
        into = patch**2 * (in_channels + low_res_channels)
        self.embed_patches = linear(into, width, axes=axes, **kinds)
        self.make_embedders(scalars, rngs)
        hidden = int(mlp_ratio * width)
        make = functools.partial(self.block, width, heads, hidden, dtype=dtype, **more)
        self.blocks = stacked.repeated(make, depth, scan=scan, rngs=rngs)
        axes = ("embed", None)
        if self.block.modulated:
            self.modulation = linear(width, 2 * width, init=zeros, axes=axes, **kinds)
        else:
            self.norm = LayerNorm(width, eps=1e-6, rngs=rngs)
        self.out = linear(width, patch**2 * self.out_channels, init=zeros, axes=axes, **kinds)

    def find_block(self, name: str) -> tuple[type, dict]:
        """The class of the blocks, and fields of theirs besides the sizes."""
        return BLOCKS[choose("block", name, BLOCKS)], {}

    def make_embedders(self, scalars: Sequence[str], rngs: nnx.Rngs) -> None:
        """The layers that `embed` uses."""
        width = self.width
        layer = functools.partial(linear, init=normal(0.02), rngs=rngs)
        first = functools.partial(layer, 256, width, axes=(None, "embed"))
        second = functools.partial(layer, width, width, axes=("embed", None))
        self.time1, self.time2 = first(), second()
        table = functools.partial(param, rngs, (self.num_classes + 1, width), normal(0.02))
        self.label = table(axes=(None, "embed")) if self.num_classes else None
        self.scalars = Scalars(scalars, lambda: (first(), second())) if scalars else None

    def embed(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Embeddings `[B, width]` of t (and the scalars) and of the label if there are classes."""
        waves = functools.partial(layers.sinusoidal, channels=256, scale=self.time_scale)
        time = self.time2(jax.nn.silu(self.time1(waves(t))))
        if self.scalars is not None:
            time = time + self.scalars(t, cond, waves)
        if self.label is None:
            return [time]
        return [time, jnp.take(self.label[...], cond["label"], axis=0, mode="fill")]

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
        x = with_low_res(self, x, cond, self.low_res_channels, self.low_res_method)
        h = self.embed_patches(patchify(x, self.patch))
        spacing = grid_spacing(rows, columns, self.image_size, self.patch)
        h = h + layers.grid_embedding(rows, columns, self.width, spacing).astype(self.dtype)
        h = hold(h.reshape(h.shape[0], rows, columns, self.width))
        h, inputs = self.block.enter(h, self.embed(t, cond))
        if self.scan:
            h = stacked.scan(self.blocks, h, *inputs, remat=self.remat)
        else:
            for block in self.blocks:
                h = run(block, h, *inputs, remat=self.remat)
        h = self.out(self.last_norm(self.block.leave(h, rows, columns), *inputs))
        return unpatchify(h, self.patch, rows, columns).astype(jnp.float32)

    def last_norm(self, h: jax.Array, *inputs: jax.Array) -> jax.Array:
        """The norm ahead of the output, of the same kind as those of the blocks."""
        if not self.block.modulated:
            return self.norm(h)
        shift, scale = jnp.split(layers.expand(self.modulation(inputs[0]), h), 2, axis=-1)
        return layer_norm(h) * (1 + scale) + shift


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


def check_image_size(image_size: int | None, patch: int) -> None:
    """Raise a ValueError unless images of that side can be cut into patches."""
    if image_size is not None and (image_size < 1 or image_size % patch):
        raise ValueError(f"image_size={image_size} must be a multiple of patch={patch}")


def grid_spacing(
    rows: int, columns: int, image_size: int | None, patch: int
) -> tuple[float, float]:
    """Distances of neighbouring rows and columns when the grid is spread over that of another."""
    if image_size is None:
        return 1.0, 1.0
    side = image_size // patch
    return side / rows, side / columns


def stack_blocks(params: dict, names: Sequence[str] = ("blocks",)) -> dict:
    """Weights of a `scan=False` network for the same one with `scan=True`.

    `names` are those of its stacks, ("blocks", "singles") of FLUX.
    """

    def stack(blocks: dict) -> dict:
        layers = [blocks[str(i)] for i in range(len(blocks))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    return params | {name: stack(params[name]) for name in names}


def unstack_blocks(params: dict, names: Sequence[str] = ("blocks",)) -> dict:
    """Weights of a `scan=True` network for the same one with `scan=False`."""

    def unstack(blocks: dict) -> dict:
        leaves, structure = jax.tree.flatten(blocks)
        depth = leaves[0].shape[0]
        return {str(i): structure.unflatten([leaf[i] for leaf in leaves]) for i in range(depth)}

    return params | {name: unstack(params[name]) for name in names}


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


def sit_imagenet(name: str = "XL/2", **changes) -> dict:
    """Fields of a published SiT ("S/2" to "XL/2"): a DiT that predicts the velocity alone.

    t in [0, 1] is embedded without a scale (Ma et al. 2024). SiT's own weights run the other way:
    at t = 1 they take data, and their velocity is data - noise.

    Raises:
        ValueError: if there is no such size.
    """
    return dit_imagenet(name, learn_sigma=False, **changes)
