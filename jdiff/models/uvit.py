"""U-ViT: a plain vision transformer with long skips (Bao et al., "All are Worth Words", 2023).

Time, the condition and the patches are tokens of one sequence with learned positions. A block of
the second half joins to its input what left the block at the same distance from the middle in the
first half, as the levels of a U-Net do.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers, stacked
from jdiff.models.attention import Attention
from jdiff.models.dit import check_image_size, patchify, unpatchify
from jdiff.models.initializers import kaiming_uniform, normal, param
from jdiff.models.layers import Conv, LayerNorm, Linear, run
from jdiff.models.low_res import METHODS, with_low_res
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.models.scalars import numbers
from jdiff.parallel import tokens as sequences
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold


class UViT(Module):
    """A U-ViT `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    H = W = `image_size`, since the positions are learned. `cond` holds "label" (int [B]) if
    `num_classes`; the index `num_classes` is the null label. With `text_width` it holds "text"
    `[B, text_tokens, text_width]`, with `low_res_channels` "low_res" [B, h, w, low_res_channels] of
    any size, which is enlarged to H x W and set behind the channels of x. There is no dropout, so
    `key` has no effect.

    Args:
        image_size: side of the images; what is trained on crops cannot serve whole images.
        in_channels: of x alone, without those of "low_res".
        low_res_method: how that is enlarged: "bilinear", "bicubic" or "nearest".
        patch: side of a patch in pixels.
        width: channels of a token; a multiple of 2 and of `heads`.
        depth: number of blocks, odd: the middle one has no skip.
        text_width: channels of the text embeddings; 0 for no text.
        text_tokens: their number.
        scalars: further numbers in `cond`, a token each, made like that of t; see `Scalars`.
        last_conv: whether a 3 x 3 convolution follows the tokens' way back to pixels, which removes
            seams between patches.
        time_scale: multiplies t (and the scalars) ahead of its embedding, a token as it is.
        dtype: of the activations; parameters, norms, softmax and the time embedding stay float32.
        scan: stack the blocks and scan over them: `stack_blocks(params, ("encoder", "decoder"))`
            converts weights.
        remat: which of the blocks' activations the backward pass computes again: a policy of
            `jdiff.models.remat`, False for none, True for all.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    rules = TRANSFORMER  # how it is split over devices

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int = 3,
        out_channels: int | None = None,
        low_res_channels: int = 0,
        low_res_method: str = "bilinear",
        patch: int = 2,
        width: int = 512,
        depth: int = 13,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        text_width: int = 0,
        text_tokens: int = 77,
        scalars: Sequence[str] = (),
        last_conv: bool = True,
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, depth=depth, width=width)
        layers.check_heads(heads, width, "width")
        check_image_size(image_size, patch)
        if width % 2:
            raise ValueError(f"width={width} must be even for the embedding of t")
        if depth % 2 == 0 or depth < 3:
            raise ValueError(
                f"depth={depth} must be odd and at least 3: half the blocks lead each way"
            )
        self.image_size, self.patch, self.in_channels = image_size, patch, in_channels
        self.width, self.num_classes, self.time_scale = width, num_classes, time_scale
        self.low_res_channels, self.scalars = low_res_channels, tuple(scalars)
        self.low_res_method = choose("low_res_method", low_res_method, METHODS)
        self.text_shape = (text_tokens, text_width) if text_width else None
        self.dtype, self.scan, self.remat = layers.float_dtype(dtype), scan, named(remat)
        out_channels = out_channels or in_channels

        layer = functools.partial(_linear, dtype=self.dtype, rngs=rngs)
        table = functools.partial(param, rngs, axes=(None, "embed"))
        into = patch**2 * (in_channels + low_res_channels)
        torch = kaiming_uniform(into, 3**-0.5)
        self.embed_patches = layer(into, width, init=torch, bias_init=torch, axes=(None, "embed"))
        self.label = table((num_classes + 1, width), normal(1.0)) if num_classes else None
        self.text = layer(text_width, width, axes=("text", "embed")) if text_width else None
        numbered = 1 + len(self.scalars) + bool(num_classes)
        self.others = numbered + (text_tokens if text_width else 0)
        places = self.others + (image_size // patch) ** 2
        self.places = table((places, width), normal(0.02))

        blocks = functools.partial(stacked.repeated, depth=depth // 2, scan=scan, rngs=rngs)
        sizes = width, heads, int(mlp_ratio * width)
        block = functools.partial(Block, *sizes, dtype=self.dtype)
        joining = functools.partial(JoiningBlock, *sizes, dtype=self.dtype)
        self.encoder, self.middle, self.decoder = blocks(block), block(rngs=rngs), blocks(joining)
        self.norm = LayerNorm(width, rngs=rngs)
        self.out = layer(width, patch**2 * out_channels, axes=("embed", None))
        start = kaiming_uniform(9 * out_channels, 3**-0.5)
        conv = functools.partial(Conv, out_channels, out_channels, 3, init=start, bias_init=start)
        self.out_conv = conv(dtype=self.dtype, rngs=rngs) if last_conv else None

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
        if x.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(
                f"UViT with image_size={self.image_size} has learned the positions of that size, "
                f"not of {x.shape[1]} x {x.shape[2]}: trained on crops it cannot serve whole "
                "images, as UNet and EfficientUNet do"
            )
        x = with_low_res(self, x, cond, self.low_res_channels, self.low_res_method)
        h = self.embed_patches(patchify(x, self.patch))
        tokens = [token.astype(h.dtype) for token in self._tokens(t, cond)]
        places = self.places[...].astype(h.dtype)
        tokens = jnp.concatenate(tokens, axis=1) + places[: self.others]
        tokens, seen = sequences.fill(tokens)
        length = tokens.shape[1]
        mask = sequences.mask(length if seen is None else seen, h.shape[1])
        h = hold(sequences.join(tokens, hold(h + places[self.others :])))
        _, h = sequences.part(self._blocks(h, mask), length)
        h = self.out(self.norm(h))
        side = self.image_size // self.patch
        y = unpatchify(h, self.patch, side, side)
        return (y if self.out_conv is None else self.out_conv(y)).astype(jnp.float32)

    def _tokens(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> list[jax.Array]:
        """The label, t, the scalars and the text as tokens `[B, N, width]`, in this order."""
        told = [t, *numbers(self.scalars, t, cond)]
        waves = [layers.sinusoidal(n, self.width, scale=self.time_scale) for n in told]
        tokens = [wave[:, None] for wave in waves]
        if self.label is not None:
            tokens.insert(0, jnp.take(self.label[...], cond["label"], axis=0, mode="fill")[:, None])
        if self.text is None:
            return tokens
        shape = (t.shape[0], *self.text_shape)
        if "text" not in cond or cond["text"].shape != shape:
            given = f"not {list(cond['text'].shape)}" if "text" in cond else f"has {sorted(cond)}"
            raise ValueError(f"UViT needs cond['text'] of shape {list(shape)}; cond {given}")
        return [*tokens, self.text(cond["text"])]

    def _blocks(self, h: jax.Array, mask: jax.Array | None) -> jax.Array:
        """h through the encoder, the middle and the decoder, which takes the last skip first."""
        if self.scan:
            h, skips = stacked.scan_down(self.encoder, h, mask, remat=self.remat)
            h = run(self.middle, h, mask, remat=self.remat)
            return stacked.scan_up(self.decoder, h, skips[::-1], mask, remat=self.remat)
        skips = []
        for block in self.encoder:
            h = run(block, h, mask, remat=self.remat)
            skips.append(h)
        h = run(self.middle, h, mask, remat=self.remat)
        for block in self.decoder:
            h = run(block, h, skips.pop(), mask, remat=self.remat)
        return h


class Block(layers.ResidualBlock):
    """A plain ViT block: norm, attention, norm, perceptron."""

    def __init__(self, width: int, heads: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        layer = functools.partial(_linear, dtype=dtype, rngs=rngs)
        self.attention = Attention(heads)
        self.norm1, self.norm2 = LayerNorm(width, rngs=rngs), LayerNorm(width, rngs=rngs)
        self.qkv = layer(width, (3, width), bias_init=None, axes=("embed", None, "heads"))
        self.project = layer(width, width, axes=("heads", "embed"))
        self.mlp1 = layer(width, hidden, axes=("embed", "mlp"))
        self.mlp2 = layer(hidden, width, axes=("mlp", "embed"))

    def __call__(self, h: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens [B, N, width] to the same; `mask` [B, 1, 1, N], where all look."""
        q, k, v = jnp.unstack(self.qkv(self.norm1(h)), axis=-2)
        h = hold(h + self.project(self.attention(q, k, v, mask)))
        return hold(h + self.mlp2(jax.nn.gelu(self.mlp1(self.norm2(h)), approximate=False)))


class JoiningBlock(Block):
    """A block that joins a long skip to its input: a linear map of both, side by side."""

    def __init__(self, width: int, *fields, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, *fields, dtype=dtype, rngs=rngs)
        self.join = _linear(2 * width, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array, skip: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens h and skip [B, N, width] to tokens like h."""
        return super().__call__(self.join(jnp.concatenate([h, skip], axis=-1)), mask)


SIZES = {
    "S": {"width": 512, "depth": 13, "heads": 8},
    "S-deep": {"width": 512, "depth": 17, "heads": 8},
    "M": {"width": 768, "depth": 17, "heads": 12},
    "L": {"width": 1024, "depth": 21, "heads": 16},
    "H": {"width": 1152, "depth": 29, "heads": 16, "last_conv": False},
}


def uvit_pixels(name: str = "S", **changes) -> dict:
    """Fields of a size of the paper's table 1: "S", "S-deep", "M", "L" or "H"; give `image_size`.

    For CIFAR-10 patches are 2 x 2 pixels, for CelebA and ImageNet at 64 pixels 4 x 4.

    Raises:
        ValueError: if there is no such size.
    """
    if name not in SIZES:
        close = difflib.get_close_matches(str(name), SIZES, n=1, cutoff=0.0)
        raise ValueError(f"name={name!r} is none of {list(SIZES)}; the nearest is {close[0]!r}")
    return SIZES[name] | changes


def uvit_imagenet(name: str = "H/2", **changes) -> dict:
    """Fields of the paper's networks for ImageNet latents: "/2" at 256 pixels, "/4" at 512.

    Raises:
        ValueError: if there is no such network.
    """
    names = [f"{size}/{patch}" for size in ("L", "H") for patch in (2, 4)]
    if name not in names:
        raise ValueError(f"name={name!r} is none of {names}")
    size, patch = name.split("/")
    latents = {"in_channels": 4, "num_classes": 1000, "image_size": 16 * int(patch)}
    return SIZES[size] | latents | {"patch": int(patch)} | changes


def _linear(features_in: int, features_out: int | tuple[int, int], **changes) -> Linear:
    return Linear(features_in, features_out, **({"init": normal(0.02)} | changes))
