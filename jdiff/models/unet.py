"""One U-Net for DDPM, DDPM++, NCSN++ and ADM: sizes are its fields, the family is its style.

The four families are the same residual U-Net but for a dozen choices, which `Style` lists.
`dataclasses.replace(STYLES["adm"], heads=8)` is a new family.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.initializers import normal, zeros
from jdiff.models.layers import Conv, GroupNorm, Linear, run
from jdiff.models.low_res import METHODS, with_low_res
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.models.scalars import Scalars
from jdiff.models.text_attention import TextPool, text_input
from jdiff.models.unet_blocks import INITS, STYLES, Block, Style, named_style, resample_layer

__all__ = [
    "STYLES",
    "Style",
    "UNet",
    "adm_imagenet64",
    "ddpm_cifar10",
    "ddpmpp_cifar10",
    "ncsnpp_cifar10",
]


class UNet(Module):
    """A U-Net `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    `cond` may hold "label" (int [B], required if `num_classes`; the index `num_classes` stands for
    no label and adds nothing) and "augment" (float [B, augment_dim]; absent means zero). A `key`
    switches dropout on. H and W may be any multiple of 2^(levels - 1), whatever the `image_size`:
    which levels attend does not depend on them. With `low_res_channels`,
    `cond` holds the image "low_res" [B, h, w, low_res_channels] of any size: it is enlarged to
    H x W and set behind the channels of x. With `text_width`, pixels that attend see the tokens of
    "text" [B, L, text_width] too, where "text_mask" (bool [B, L], absent for all) is True, and
    their pooled vector is added to the embedding (Imagen's base network).

    Args:
        image_size: the resolution that `attention_sizes` refers to; with training on crops, theirs.
        in_channels: of x alone, without those of "low_res".
        low_res_method: how that is enlarged: "bilinear", "bicubic" or "nearest".
        channels: width of the first level, multiplied by `multipliers` at each level.
        blocks: residual blocks a level (the decoder has one more).
        attention_sizes: resolutions with self-attention; the middle always has it.
        scalars: further numbers in `cond`, embedded like t; ("t-s",) makes it a flow map. See
            `Scalars`.
        dropout: rate inside the residual blocks.
        style: a name in `STYLES` or a `Style`.
        time_scale: multiplies t (and the scalars) ahead of its embedding.
        frequencies: of the "fourier" embedding, `channels * time_width / 2` of them; by default
            `layers.gaussian_frequencies` with scale 16.
        dtype: of the activations, "float32" or "bfloat16"; parameters, norms, softmax and the
            embedding of t stay float32.
        remat: which of the blocks' activations the backward pass computes again: a policy of
            `jdiff.models.remat`, False for none, True for all.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int = 3,
        out_channels: int | None = None,
        low_res_channels: int = 0,
        low_res_method: str = "bilinear",
        channels: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 4,
        attention_sizes: Sequence[int] = (16,),
        num_classes: int = 0,
        augment_dim: int = 0,
        text_width: int = 0,
        scalars: Sequence[str] = (),
        dropout: float = 0.0,
        style: str | Style = "ddpmpp",
        time_scale: float = 1.0,
        frequencies: Sequence[float] | None = None,
        dtype: str | jnp.dtype = "float32",
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        s = style if isinstance(style, Style) else named_style(style)
        layers.check_positive(image_size=image_size, in_channels=in_channels, channels=channels)
        widths = [round(channels * multiplier) for multiplier in multipliers]
        if not widths or any(w < 1 or w != channels * m for w, m in zip(widths, multipliers)):
            raise ValueError(
                f"multipliers={tuple(multipliers)} must make whole numbers of channels={channels}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.multiple = 2 ** (len(multipliers) - 1)
        if image_size % self.multiple:
            raise ValueError(
                f"image_size={image_size} must be divisible by {self.multiple} "
                f"for {len(multipliers)} multipliers"
            )
        self.style, self.remat, self.dtype = s, named(remat), layers.float_dtype(dtype)
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.low_res_channels, self.text_width = low_res_channels, text_width
        self.low_res_method = choose("low_res_method", low_res_method, METHODS)
        self.num_classes, self.augment_dim, self.dropout = num_classes, augment_dim, dropout
        self.time_scale, self.time_channels = time_scale, channels * s.time_width
        self.frequencies = None
        if s.time == "fourier":
            half = self.time_channels // 2
            given = layers.gaussian_frequencies(half) if frequencies is None else frequencies
            self.frequencies = tuple(map(float, given))
            if len(self.frequencies) != half:
                raise ValueError(f"frequencies has {len(self.frequencies)} entries, needs {half}")

        inits, width = INITS[s.init], 4 * channels
        linear = functools.partial(inits.linear, rngs=rngs)
        self.time1 = linear(self.time_channels, width)
        self.time2 = linear(width, width)
        pair = lambda: (linear(self.time_channels, width), linear(width, width))
        self.scalars = Scalars(scalars, pair) if scalars else None
        label = augment = None
        if num_classes and s.label == "before":
            label = linear(num_classes, self.time_channels)
        elif num_classes:
            label = Linear(num_classes, width, init=normal(1.0), bias_init=None, rngs=rngs)
        if augment_dim:
            out = self.time_channels
            rule = zeros if s.init == "adm" else inits.kernel(augment_dim, out)
            augment = Linear(augment_dim, out, init=rule, bias_init=None, rngs=rngs)
        self.label, self.augment = label, augment
        heads = max(1, width // 64)
        self.pool = TextPool(text_width, width, heads, rngs=rngs) if text_width else None

        common = {"style": s, "width": width, "dropout": dropout, "rngs": rngs}
        make = functools.partial(Block, text_width=text_width, dtype=self.dtype, **common)
        conv = functools.partial(inits.conv, dtype=self.dtype, rngs=rngs)
        attends = [image_size >> level in attention_sizes for level in range(len(multipliers))]
        last = len(widths) - 1

        now, aux = widths[0] if s.wide_stem else channels, in_channels + low_res_channels
        self.stem = conv(aux, now, 3)
        skips, encoder, decoder = [now], [], []
        for level, channels_out in enumerate(widths):
            resample = image = None
            if level > 0:
                resample = resample_layer("down", now, s, make, conv)
                skips.append(now)
                if s.residual_encoder:
                    # Padded by what the filter that follows takes away.
                    image, aux = conv(aux, now, 3, padding=len(s.taps) // 2), now
            stage = []
            for _ in range(blocks):
                stage.append(make(now, channels_out, attend=attends[level]))
                now = channels_out
                skips.append(now)
            encoder.append(Stage(stage, resample, image))
        self.encoder = nnx.List(encoder)

        self.middle = nnx.List([make(now, now, attend=True), make(now, now)])

        for level, channels_out in reversed(list(enumerate(widths))):
            resample = resample_layer("up", now, s, make, conv) if level < last else None
            stage = []
            for index in range(blocks + 1):
                attend = attends[level] and (s.decoder_attention == "all" or index == blocks)
                stage.append(make(now + skips.pop(), channels_out, attend=attend))
                now = channels_out
            decoder.append(Stage(stage, resample))
        self.decoder = nnx.List(decoder)

        self.out_norm = GroupNorm(now, eps=s.eps, groups=s.groups, rngs=rngs)
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
        layers.check_inputs(
            self,
            x,
            t,
            cond,
            in_channels=self.in_channels,
            multiple=self.multiple,
            reason="it halves the image at every level",
            num_classes=self.num_classes,
        )
        text, mask = text_input(self, x, cond, self.text_width)
        embedding = self.embed(t, cond, text, mask)
        keys = iter(())
        if key is not None and self.dropout:
            stages = [*self.encoder, *self.decoder]
            number = len(self.middle) + sum(1 + len(stage.blocks) for stage in stages)
            keys = iter(jax.random.split(key, number))

        def apply(block: nnx.Module, h: jax.Array) -> jax.Array:
            return run(block, h, embedding, next(keys, None), text, mask, remat=self.remat)

        low_res = self.low_res_channels, self.low_res_method
        aux = with_low_res(self, x.astype(self.dtype), cond, *low_res)
        h = self.stem(aux)
        skips = [h]
        for stage in self.encoder:
            if stage.resample is not None:
                h = apply(stage.resample, h)
                if stage.image is not None:
                    shrunk = layers.downsample(stage.image(aux), self.style.taps, pad=False)
                    h = aux = (h + shrunk) * math.sqrt(0.5)
                skips.append(h)
            for block in stage.blocks:
                h = apply(block, h)
                skips.append(h)
        for block in self.middle:
            h = apply(block, h)
        for stage in self.decoder:
            if stage.resample is not None:
                h = apply(stage.resample, h)
            for block in stage.blocks:
                h = apply(block, jnp.concatenate([h, skips.pop()], axis=-1))
        return self.out_conv(jax.nn.silu(self.out_norm(h))).astype(jnp.float32)

    def embed(
        self,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The vector that conditions every block, [B, 4 * channels], float32."""
        waves = self.waves(t)
        label = 0.0
        if self.label is not None:
            # No row is hot for the null label, so it adds nothing but the bias.
            label = jax.nn.one_hot(cond["label"], self.num_classes)
            gain = math.sqrt(self.num_classes) if self.style.label == "before" else 1.0
            label = self.label(gain * label)
        if self.augment is not None and "augment" in cond:
            given = cond["augment"]
            if given.shape != (t.shape[0], self.augment_dim):
                raise ValueError(
                    f"UNet takes cond['augment'] of shape [B, augment_dim] = "
                    f"[{t.shape[0]}, {self.augment_dim}], not {list(given.shape)}"
                )
            waves = waves + self.augment(given)
        before, after = (label, 0.0) if self.style.label == "before" else (0.0, label)
        if self.scalars is not None:
            after = after + self.scalars(t, cond, self.waves)
        if self.pool is not None:
            after = after + self.pool(text, mask)
        h = jax.nn.silu(self.time1(waves + before))
        return jax.nn.silu(self.time2(h) + after)

    def waves(self, t: jax.Array) -> jax.Array:
        """The sinusoids of t, [B, time_channels], float32."""
        if self.style.time == "fourier":
            return layers.fourier(self.time_scale * t, self.frequencies)
        return layers.sinusoidal(
            t,
            self.time_channels,
            order=self.style.time,
            endpoint=self.style.time == "sin_cos",
            scale=self.time_scale,
        )


class Stage(Module):
    """One resolution: an optional change of resolution, then blocks. A container only."""

    def __init__(
        self,
        blocks: list[Block],
        resample: nnx.Module | None = None,
        image: Conv | None = None,
    ):
        self.resample, self.image = resample, image
        self.blocks = nnx.List(blocks)


def ddpm_cifar10(**changes) -> dict:
    """Fields of DDPM's CIFAR-10 network (35.7 M parameters); `t` is the step 0..999."""
    fields = {"image_size": 32, "channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2}
    return fields | {"dropout": 0.1, "style": "ddpm"} | changes


def ddpmpp_cifar10(**changes) -> dict:
    """Fields of EDM's DDPM++ for CIFAR-10 (55.7 M parameters)."""
    fields = {"image_size": 32, "channels": 128, "multipliers": (2, 2, 2), "blocks": 4}
    return fields | {"augment_dim": 9, "dropout": 0.13, "style": "ddpmpp"} | changes


def ncsnpp_cifar10(**changes) -> dict:
    """Fields of EDM's NCSN++ for CIFAR-10 (56.4 M parameters)."""
    return ddpmpp_cifar10(style="ncsnpp") | changes


def adm_imagenet64(**changes) -> dict:
    """Fields of EDM's ADM for class-conditional ImageNet-64 (295.9 M parameters)."""
    fields = {"image_size": 64, "channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3}
    fields |= {"attention_sizes": (32, 16, 8), "num_classes": 1000, "dropout": 0.1, "style": "adm"}
    return fields | changes
