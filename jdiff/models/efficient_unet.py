"""Imagen's Efficient U-Net, for super-resolution from text (Saharia et al. 2022, appendices B, F).

Against ADM's U-Net most parameters sit at low resolution, residual sums are scaled by sqrt(1/2),
and a level changes its resolution before its blocks on the way down and after them on the way up,
so that no block runs at the resolution of the image.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.layers import GroupNorm, run
from jdiff.models.low_res import METHODS, with_low_res
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.models.scalars import Scalars
from jdiff.models.text_attention import PixelAttention, TextPool, text_input
from jdiff.models.unet_blocks import INITS, ConvResample

EPS = 1e-5  # of the group norms
INIT = INITS["adm"]


class EfficientUNet(Module):
    """A U-Net `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    H and W are any multiples of the product of `strides`: trained on crops, it serves whole images.
    `cond` holds

    - "low_res" [B, h, w, low_res_channels] if those: it is enlarged to H x W;
    - "text" [B, L, text_width] if that, and optionally "text_mask" bool [B, L];
    - the `scalars`, [B] each: "aug_level" is the noise level of "low_res".

    Args:
        in_channels: of x alone, without those of "low_res".
        low_res_method: how that is enlarged: "bilinear", "bicubic" or "nearest".
        widths: channels of each level.
        blocks: residual blocks of each level, on the way down and again on the way up.
        strides: by which each level divides the resolution, 1 or 2.
        self_attention: which levels' pixels attend to each other.
        text_attention: which levels' pixels attend to the text; with both, in one softmax.
        heads: of every attention.
        scalars: further numbers in `cond`, embedded like t. See `Scalars`.
        dropout: rate inside the residual blocks.
        skip_scale: factor on each residual sum.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
        dtype: of the activations, "float32" or "bfloat16"; parameters, norms, softmax and the
            embedding of t stay float32.
        remat: a policy of `jdiff.models.remat`; False for none, True for all.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        low_res_channels: int = 0,
        low_res_method: str = "bilinear",
        widths: Sequence[int] = (128, 256, 512, 1024),
        blocks: Sequence[int] = (2, 4, 8, 8),
        strides: Sequence[int] = (2, 2, 2, 2),
        self_attention: Sequence[bool] = (False, False, False, True),
        text_attention: Sequence[bool] = (False, False, False, False),
        heads: int = 8,
        text_width: int = 0,
        scalars: Sequence[str] = (),
        dropout: float = 0.0,
        skip_scale: float = math.sqrt(0.5),
        time_scale: float = 1.0,
        dtype: str | jnp.dtype = "float32",
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels)
        levels = {
            "blocks": blocks,
            "strides": strides,
            "self_attention": self_attention,
            "text_attention": text_attention,
        }
        _check_levels(tuple(widths), levels)
        if any(text_attention) and not text_width:
            raise ValueError(f"text_attention={tuple(text_attention)} needs a text_width, not 0")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.multiple = math.prod(strides)
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.low_res_channels, self.text_width = low_res_channels, text_width
        self.low_res_method = choose("low_res_method", low_res_method, METHODS)
        self.dropout, self.time_scale = dropout, time_scale
        self.dtype, self.remat = layers.float_dtype(dtype), named(remat)

        width, self.time_channels = 4 * widths[0], widths[0]
        linear = functools.partial(INIT.linear, rngs=rngs)
        pair = lambda: (linear(self.time_channels, width), linear(width, width))
        self.time1, self.time2 = pair()
        self.scalars = Scalars(scalars, pair) if scalars else None
        self.pool = TextPool(text_width, width, heads, rngs=rngs) if text_width else None

        conv = functools.partial(INIT.conv, dtype=self.dtype, rngs=rngs)
        common = {"dtype": self.dtype, "rngs": rngs}
        block = functools.partial(ResNetBlock, width=width, dropout=dropout, scale=skip_scale)

        def level(i: int, channels_in: int, resample: ConvResample | None) -> Level:
            inputs = [channels_in] + [widths[i]] * (blocks[i] - 1)
            attention = None
            if self_attention[i] or text_attention[i]:
                attention = PixelAttention(
                    widths[i],
                    heads,
                    to_pixels=self_attention[i],
                    text_width=text_width if text_attention[i] else 0,
                    scale=skip_scale,
                    eps=EPS,
                    **common,
                )
            return Level([block(c, widths[i], **common) for c in inputs], attention, resample)

        self.stem = conv(in_channels + low_res_channels, widths[0], 3)
        now, encoder, decoder = widths[0], [], []
        for i, channels in enumerate(widths):
            down = None
            if strides[i] > 1:
                down, now = ConvResample("down", conv(now, channels, 3, stride=2)), channels
            encoder.append(level(i, now, down))
            now = channels
        for i, channels in reversed(list(enumerate(widths))):
            up = ConvResample("up", conv(channels, channels, 3)) if strides[i] > 1 else None
            # The innermost level goes on from itself.
            skip = 0 if i == len(widths) - 1 else channels
            decoder.append(level(i, now + skip, up))
            now = channels
        self.encoder, self.decoder = nnx.List(encoder), nnx.List(decoder)
        self.out = conv(now, self.out_channels, 1, zero=True)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's raw output for noisy images x at noise conditioning t."""
        layers.check_inputs(
            self,
            x,
            t,
            cond,
            in_channels=self.in_channels,
            multiple=self.multiple,
            reason="its strides divide the image",
            num_classes=0,
        )
        text, mask = text_input(self, x, cond, self.text_width)
        embedding = self.embed(t, cond, text, mask)
        keys = iter(())
        if key is not None and self.dropout:
            number = sum(len(level.blocks) for level in (*self.encoder, *self.decoder))
            keys = iter(jax.random.split(key, number))

        def through(level: Level, h: jax.Array) -> jax.Array:
            for block in level.blocks:
                h = run(block, h, embedding, next(keys, None), remat=self.remat)
            if level.attention is not None:
                h = run(level.attention, h, text, mask, remat=self.remat)
            return h

        low_res = self.low_res_channels, self.low_res_method
        h = self.stem(with_low_res(self, x.astype(self.dtype), cond, *low_res))
        skips = []
        for level in self.encoder:
            if level.resample is not None:
                h = level.resample(h, embedding, None)
            h = through(level, h)
            skips.append(h)
        skips.pop()
        for i, level in enumerate(self.decoder):
            h = through(level, jnp.concatenate([h, skips.pop()], axis=-1) if i else h)
            if level.resample is not None:
                h = level.resample(h, embedding, None)
        return self.out(h).astype(jnp.float32)

    def embed(
        self,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The vector that conditions every block, [B, 4 * widths[0]], float32."""
        waves = functools.partial(
            layers.sinusoidal, channels=self.time_channels, scale=self.time_scale
        )
        c = self.time2(jax.nn.silu(self.time1(waves(t))))
        if self.scalars is not None:
            c = c + self.scalars(t, cond, waves)
        if self.pool is not None:
            c = c + self.pool(text, mask)
        return jax.nn.silu(c)


class Level(Module):
    """One resolution: blocks, attention, and what changes the resolution. A container only."""

    def __init__(
        self,
        blocks: "list[ResNetBlock]",
        attention: PixelAttention | None,
        resample: ConvResample | None,
    ):
        self.blocks, self.attention, self.resample = nnx.List(blocks), attention, resample


class ResNetBlock(layers.ResidualBlock):
    """Figure A.27, with the second norm scaled and shifted by the embedding (its CombineEmbs)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        width: int,
        dropout: float,
        scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.scale, self.dropout = scale, dropout
        conv = functools.partial(INIT.conv, dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(channels_in, eps=EPS, rngs=rngs)
        self.conv1 = conv(channels_in, channels_out, 3)
        self.affine = INIT.linear(width, 2 * channels_out, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, eps=EPS, rngs=rngs)
        self.conv2 = conv(channels_out, channels_out, 3, zero=True)
        self.skip = conv(channels_in, channels_out, 1)

    def __call__(self, x: jax.Array, embedding: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, H, W, channels_in] to [B, H, W, channels_out]; `embedding` [B, width] float32."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        affine = self.affine(embedding)[:, None, None, :].astype(h.dtype)
        scale, shift = jnp.split(affine, 2, axis=-1)
        h = jax.nn.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.conv2(layers.dropout(h, self.dropout, key))
        return (h + self.skip(x)) * self.scale


def imagen_upsampler(image_size: int = 256, **changes) -> dict:
    """Fields of Imagen's super-resolution networks, to 256 (from 64) or 1024 pixels (from 256).

    As far as appendix F.2 and F.3 give them: widths, blocks, strides, attention. Not given are the
    width of the embedding (here 4 * 128), the pooling's, and how CombineEmbs combines, so the 521
    and 513 M parameters are not the paper's rounded 600 and 400 M; the two networks differ there
    by more than the self-attention that tells them apart. `t` and "aug_level" lie in [0, 1];
    "text" is T5-XXL's.

    Raises:
        UserError: for another size.
    """
    last = (False, False, False, True)
    sizes = {"256": last, "1024": (False,) * 4}
    size = choose("imagen_upsampler: image_size", str(image_size), sizes)
    fields = {"low_res_channels": 3, "widths": (128, 256, 512, 1024), "blocks": (2, 4, 8, 8)}
    fields |= {"self_attention": sizes[size], "text_attention": last, "text_width": 4096}
    return fields | {"scalars": ("aug_level",), "time_scale": 1000.0} | changes


def _check_levels(widths: tuple[int, ...], levels: Mapping[str, Sequence]) -> None:
    if not widths or min(widths) < 1:
        raise ValueError(f"widths={widths} must be whole numbers, 1 or more")
    for name, entries in levels.items():
        if len(entries) != len(widths):
            raise ValueError(
                f"{name}={tuple(entries)} has {len(entries)} entries, not one for each of the "
                f"{len(widths)} widths={widths}"
            )
    if min(levels["blocks"]) < 1:
        raise ValueError(f"blocks={tuple(levels['blocks'])} must be 1 or more")
    if set(levels["strides"]) - {1, 2}:
        raise ValueError(f"strides={tuple(levels['strides'])} must be 1 or 2")
