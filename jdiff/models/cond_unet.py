"""The text-conditional U-Net of latent diffusion: Stable Diffusion 1, 2, XL and their relatives.

Rombach et al. 2022 (the network), Podell et al. 2023 (SDXL's depths and added conditions), Luo et
al. 2023 (the guidance scale as an input, which latent consistency models take).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.cond_unet_blocks import SpatialTransformer, linear
from jdiff.models.initializers import normal, param
from jdiff.models.layers import GroupNorm, entry, run
from jdiff.models.low_res import METHODS, with_low_res
from jdiff.models.module import Module
from jdiff.models.scalars import Scalars
from jdiff.models.unet_blocks import INITS, Block, Style, resample_layer

#: Where a checkpoint of this family has 1 x 1 convolutions or linear layers around its blocks.
PROJECTIONS = ("conv", "linear")


class CondUNet(Module):
    """A U-Net `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `t` is the step, 0..999 in the published ones. H and W are multiples of 2^(levels - 1). There is
    no dropout, so `key` has no effect. `cond` holds

    - "text" `[B, L, text_width]`, and "text_mask" bool `[B, L]` if places are not to be seen;
    - "pooled" `[B, P]` and "time_ids" `[B, N]` if `added_width`, which is P + N * added_channels;
    - "low_res" `[B, h, w, low_res_channels]` if those: it is enlarged to H x W and
      follows x in the channels (a small image, or an inpainting's mask and masked image);
    - "label" int `[B]` if `num_classes` (a class, or the noise level of "low_res"); the index
      `num_classes` adds nothing;
    - "guidance" `[B]` if `guidance_channels`: the scale s of s * conditional + (1 - s) *
      unconditional, of which the network is told 1000 (s - 1).

    Args:
        in_channels: of x alone, without those of "low_res".
        low_res_method: how that is enlarged: "bilinear", "bicubic" or "nearest".
        widths: channels of each level.
        blocks: residual blocks a level (the decoder has one more).
        depths: transformer blocks after each residual block of a level; 0 for none.
        middle_depth: those in the middle, at least 1.
        heads: attention heads of each level; the middle has those of the last.
        cross_only: for each level, whether the first attention of its transformer blocks looks at
            the text instead of the image; () for no level.
        projection: "conv" or "linear", see `SpatialTransformer`.
        added_channels: of the embedding of each entry of "time_ids".
        scalars: further numbers in `cond`, embedded like t; ("t-s",) makes it a flow map. See
            `Scalars`.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
        groups: of all group normalisations; `eps` is theirs in the residual blocks.
        dtype: of the activations, "float32" or "bfloat16"; parameters, norms, softmax and
            embeddings of numbers stay float32.
        scan: stack the transformer blocks that follow each other and scan over them.
        remat: what to keep for the backward pass, see `jdiff.models.remat`.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int | None = None,
        low_res_channels: int = 0,
        low_res_method: str = "bilinear",
        widths: Sequence[int] = (320, 640, 1280, 1280),
        blocks: int = 2,
        depths: Sequence[int] = (1, 1, 1, 0),
        middle_depth: int = 1,
        heads: Sequence[int] = (8, 8, 8, 8),
        text_width: int = 768,
        cross_only: Sequence[bool] = (),
        projection: Literal["conv", "linear"] = "conv",
        added_width: int = 0,
        added_channels: int = 256,
        num_classes: int = 0,
        guidance_channels: int = 0,
        scalars: Sequence[str] = (),
        time_scale: float = 1.0,
        groups: int = 32,
        eps: float = 1e-5,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        choose("projection", projection, PROJECTIONS)
        cross_only = tuple(cross_only) or (False,) * len(widths)
        _check_levels(widths, depths=depths, heads=heads, cross_only=cross_only)
        layers.check_positive(in_channels=in_channels, blocks=blocks, middle_depth=middle_depth)
        layers.check_positive(text_width=text_width, eps=eps, groups=groups)
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.low_res_channels, self.text_width = low_res_channels, text_width
        self.low_res_method = choose("low_res_method", low_res_method, METHODS)
        self.added_width, self.added_channels = added_width, added_channels
        self.num_classes, self.guidance_channels = num_classes, guidance_channels
        self.channels, self.time_scale = widths[0], time_scale
        self.multiple = 2 ** (len(widths) - 1)
        self.dtype, self.remat = layers.float_dtype(dtype), remat

        width = 4 * widths[0]
        dense = functools.partial(linear, axes=(None, "embed"), rngs=rngs)
        pair = lambda features_in: (dense(features_in, width), dense(width, width))
        self.time1, self.time2 = pair(widths[0])
        self.added1, self.added2 = pair(added_width) if added_width else (None, None)
        self.label = param(rngs, (num_classes, width), normal(1.0)) if num_classes else None
        guide = functools.partial(dense, guidance_channels, widths[0], bias=False)
        self.guidance = guide() if guidance_channels else None
        self.scalars = Scalars(scalars, lambda: pair(widths[0])) if scalars else None

        style = Style(
            "cos_sin", eps=eps, groups=groups, resample="conv", down_padding=1, init="adm"
        )
        common = {"dtype": self.dtype, "rngs": rngs}
        conv = functools.partial(INITS["adm"].conv, **common)
        block = functools.partial(Block, width=width, dropout=0.0, style=style, **common)
        transformer = functools.partial(
            SpatialTransformer,
            text_width=text_width,
            projection=projection,
            groups=groups,
            scan=scan,
            remat=remat,
            **common,
        )

        def attend(level: int, depth: int) -> SpatialTransformer:
            look = {"heads": heads[level], "cross_only": cross_only[level]}
            return transformer(widths[level], depth=depth, **look)

        def make_stage(level: int, channels_in: list[int], direction: str | None) -> Stage:
            now = widths[level]
            number = len(channels_in) if depths[level] else 0
            return Stage(
                [block(channels, now) for channels in channels_in],
                [attend(level, depths[level]) for _ in range(number)],
                resample_layer(direction, now, style, block, conv) if direction else None,
            )

        last = len(widths) - 1
        self.stem = conv(in_channels + low_res_channels, widths[0], 3)
        now, skips, encoder, decoder = widths[0], [widths[0]], [], []
        for level, channels_out in enumerate(widths):
            channels_in = [now] + [channels_out] * (blocks - 1)
            encoder.append(make_stage(level, channels_in, "down" if level < last else None))
            skips += [channels_out] * (blocks + (level < last))
            now = channels_out
        self.encoder = nnx.List(encoder)

        middle = transformer(now, depth=middle_depth, heads=heads[last])
        self.middle = Stage([block(now, now), block(now, now)], [middle])

        for level, channels_out in reversed(list(enumerate(widths))):
            channels_in = [
                (now if index == 0 else channels_out) + skips.pop() for index in range(blocks + 1)
            ]
            decoder.append(make_stage(level, channels_in, "up" if level else None))
            now = channels_out
        self.decoder = nnx.List(decoder)

        self.out_norm = GroupNorm(now, eps=eps, groups=groups, rngs=rngs)
        self.out_conv = conv(now, self.out_channels, 3, zero=True)

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
            multiple=self.multiple,
            reason="it halves the image at every level but the last",
            num_classes=self.num_classes,
        )
        text = entry(self, cond, "text", (x.shape[0], "L", self.text_width)).astype(self.dtype)
        mask = None
        if "text_mask" in cond:
            mask = entry(self, cond, "text_mask", text.shape[:2])[:, None, None, :]
        embedding = self.embed(t, cond)

        def apply(block: nnx.Module, h: jax.Array) -> jax.Array:
            return run(block, h, embedding, None, remat=self.remat)

        low_res = self.low_res_channels, self.low_res_method
        h = self.stem(with_low_res(self, x.astype(self.dtype), cond, *low_res))
        skips = [h]
        for stage in self.encoder:
            for index, block in enumerate(stage.blocks):
                h = apply(block, h)
                if stage.transformers:
                    h = stage.transformers[index](h, text, mask)
                skips.append(h)
            if stage.resample is not None:
                h = apply(stage.resample, h)
                skips.append(h)
        first, second = self.middle.blocks
        h = apply(second, self.middle.transformers[0](apply(first, h), text, mask))
        for stage in self.decoder:
            for index, block in enumerate(stage.blocks):
                h = apply(block, jnp.concatenate([h, skips.pop()], axis=-1))
                if stage.transformers:
                    h = stage.transformers[index](h, text, mask)
            if stage.resample is not None:
                h = apply(stage.resample, h)
        return self.out_conv(jax.nn.silu(self.out_norm(h))).astype(jnp.float32)

    def embed(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> jax.Array:
        """The vector that conditions every residual block, [B, 4 * widths[0]], float32."""
        batch = t.shape[0]
        waves = functools.partial(layers.sinusoidal, channels=self.channels, scale=self.time_scale)
        h = waves(t)
        if self.guidance is not None:
            scale = 1000.0 * (entry(self, cond, "guidance", (batch,)) - 1.0)
            order = {"order": "sin_cos", "endpoint": True}
            h = h + self.guidance(layers.sinusoidal(scale, self.guidance_channels, **order))
        h = self.time2(jax.nn.silu(self.time1(h)))
        if self.label is not None:
            h = h + jnp.take(self.label[...], cond["label"], axis=0, mode="fill", fill_value=0)
        if self.added1 is not None:
            h = h + self.added2(jax.nn.silu(self.added1(self.added(cond, batch))))
        if self.scalars is not None:
            h = h + self.scalars(t, cond, waves)
        return jax.nn.silu(h)

    def added(self, cond: Mapping[str, jax.Array], batch: int) -> jax.Array:
        """The pooled text and the sinusoids of the time ids, [B, added_width], float32."""
        pooled = entry(self, cond, "pooled", (batch, "P"))
        ids = entry(self, cond, "time_ids", (batch, "N"))
        if pooled.shape[1] + ids.shape[1] * self.added_channels != self.added_width:
            raise ValueError(
                f"CondUNet has added_width={self.added_width}, but cond['pooled'] "
                f"{list(pooled.shape)} and cond['time_ids'] {list(ids.shape)} make "
                f"{pooled.shape[1]} + {ids.shape[1]} * {self.added_channels}"
            )
        waves = layers.sinusoidal(ids.reshape(-1), self.added_channels).reshape(batch, -1)
        return jnp.concatenate([pooled.astype(jnp.float32), waves], axis=-1)


class Stage(Module):
    """One resolution: blocks, each followed by a transformer if there are any. A container only."""

    def __init__(
        self,
        blocks: list[Block],
        transformers: list[SpatialTransformer],
        resample: nnx.Module | None = None,
    ):
        self.blocks, self.transformers = nnx.List(blocks), nnx.List(transformers)
        self.resample = resample


def sd15(**changes) -> dict:
    """Fields of Stable Diffusion 1.1 to 1.5 (859.5 M parameters); text of CLIP ViT-L/14."""
    return {"in_channels": 4, "text_width": 768} | changes


def sd2(**changes) -> dict:
    """Fields of Stable Diffusion 2.0 and 2.1 (865.9 M parameters); text of OpenCLIP ViT-H/14."""
    fields = {"in_channels": 4, "heads": (5, 10, 20, 20), "text_width": 1024}
    return fields | {"projection": "linear"} | changes


def sdxl(**changes) -> dict:
    """Fields of SDXL's base network (2567.5 M parameters).

    "pooled" is OpenCLIP ViT-bigG's `[B, 1280]`; "time_ids" `[B, 6]` are the original height and
    width, the crop's top and left, and the target height and width, in pixels.
    """
    fields = {"in_channels": 4, "widths": (320, 640, 1280), "depths": (0, 2, 10)}
    fields |= {"middle_depth": 10, "heads": (5, 10, 20), "text_width": 2048}
    return fields | {"projection": "linear", "added_width": 1280 + 6 * 256} | changes


def sd_upscaler(**changes) -> dict:
    """Fields of Stable Diffusion's 4x upscaler: "low_res" is the image, "label" its noise level."""
    fields = {"in_channels": 4, "low_res_channels": 3, "widths": (256, 512, 512, 1024)}
    fields |= {"depths": (0, 1, 1, 1), "cross_only": (True, True, True, False)}
    return fields | {"text_width": 1024, "projection": "linear", "num_classes": 1000} | changes


def _check_levels(widths: Sequence[int], **fields: Sequence[int]) -> None:
    """Raise a ValueError unless there is one entry a level, and the heads divide the widths."""
    if not widths or min(widths) < 1:
        raise ValueError(f"widths={tuple(widths)} must be whole numbers, 1 or more")
    for name, entries in fields.items():
        if len(entries) != len(widths):
            raise ValueError(
                f"{name}={tuple(entries)} has {len(entries)} entries, not one for each of the "
                f"{len(widths)} widths={tuple(widths)}"
            )
    if min(fields["depths"]) < 0:
        raise ValueError(f"depths={tuple(fields['depths'])} must not be negative")
    # The middle attends with the heads of the last level, whatever its own depth.
    attending = [*fields["depths"][:-1], 1]
    for width, depth, heads in zip(widths, attending, fields["heads"]):
        if depth:
            layers.check_heads(heads, width, "the width of its level")
