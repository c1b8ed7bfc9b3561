"""EDM2: a U-Net that keeps the magnitude of its activations (Karras et al. 2024, configuration G).

No layer has a bias or a norm with learned parameters: every weight is used normalised, and sums,
concatenations and nonlinearities are scaled to match (`jdiff.models.magnitude`). Training keeps the
length of the weights fixed with `magnitude.normalize`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.initializers import param, zeros
from jdiff.models.layers import run
from jdiff.models.magnitude import MPConv, MPLinear, mp_cat, mp_silu, mp_sum, normalized, unit
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.models.unet import Stage


class Block(layers.ResidualBlock):
    """A block of figure 21: an encoder's normalises its input's pixels, a decoder's does not."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        side: Literal["encoder", "decoder"],
        width: int,
        head_channels: int,
        dropout: float,
        balance: tuple[float, float],
        clip: float,
        attend: bool = False,
        resample: Literal["up", "down"] | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.side, self.resample, self.dropout = side, resample, dropout
        self.residual_balance, self.attention_balance = balance
        self.clip = clip
        conv = functools.partial(MPConv, dtype=dtype, rngs=rngs)
        self.conv1 = conv(channels_out if side == "encoder" else channels_in, channels_out, 3)
        self.affine = MPLinear(width, channels_out, axes=(None, "channels_out"), rngs=rngs)
        self.gain = param(rngs, (), zeros)
        self.conv2 = conv(channels_out, channels_out, 3)
        self.skip = conv(channels_in, channels_out, 1) if channels_in != channels_out else None
        heads = max(1, channels_out // head_channels)
        self.attention = Attention(heads) if attend else None
        if attend:
            layers.check_heads(heads, channels_out, "channels")
            self.qkv = conv(channels_out, 3 * channels_out, 1)
            self.project = conv(channels_out, channels_out, 1)

    def __call__(self, x: jax.Array, embedding: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, H, W, channels_in] to [B, H', W', channels_out]; `embedding` [B, width] float32."""
        if self.resample is not None:
            x = (layers.upsample if self.resample == "up" else layers.downsample)(x)
        if self.side == "encoder":
            x = unit(x if self.skip is None else self.skip(x))
        y = self.conv1(mp_silu(x))
        c = self.affine(embedding, self.gain[...]) + 1
        y = mp_silu(y * c[:, None, None, :].astype(y.dtype))
        y = self.conv2(layers.dropout(y, self.dropout, key))
        if self.side == "decoder" and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, self.residual_balance)
        if self.attention is not None:
            # Cosine attention: each head's q, k and v have unit magnitude.
            qkv = self.qkv(x)
            heads = qkv.reshape(*qkv.shape[:-1], 3, self.attention.heads, -1)
            q, k, v = jnp.moveaxis(unit(heads).reshape(*x.shape[:-1], 3, -1), -2, 0)
            x = mp_sum(x, self.project(self.attention(q, k, v)), self.attention_balance)
        return jnp.clip(x, -self.clip, self.clip)


class EDM2(Module):
    """EDM2 `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, out_channels]` float32.

    x of unit variance, as the parameterisation "edm" hands it over, and t = log(sigma) / 4. `cond`
    holds "label" (int [B]) if `num_classes`; the index `num_classes` stands for no label. A `key`
    switches dropout on. H and W may be any multiple of 2^(levels - 1).

    The head that predicts the loss's log variance belongs to the loss, not to the network: the
    published parameter counts include its 128 weights.

    Args:
        image_size: the resolution that `attention_sizes` refers to.
        channels: width of the first level, multiplied by `multipliers` at each level.
        blocks: residual blocks a level (the decoder has one more).
        attention_sizes: resolutions with self-attention; the middle always has it.
        head_channels: of an attention head.
        label_balance: share of the label in the embedding, between 0 and 1; likewise
        concat_balance: of the encoder's features,
        residual_balance: of a block's residual branch,
        attention_balance: of its attention.
        clip: bound of each block's output.
        time_scale: multiplies t ahead of its embedding.
        frequencies: of the Fourier features of t, in radians, `channels * multipliers[0]` of them;
            by default the quantiles of |2 pi N(0, 1)|.
        phases: theirs, in radians; by default evenly spread.
        dtype: of the activations, "float32" or "bfloat16"; parameters, norms, softmax and the
            embedding stay float32.
        remat: a policy of `jdiff.models.remat`; False for none, True for all.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    #: What an optimiser of its weights becomes; training by a config applies it.
    constrained = staticmethod(normalized)

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_sizes: Sequence[int] = (16, 8),
        head_channels: int = 64,
        num_classes: int = 0,
        dropout: float = 0.0,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        clip: float = 256.0,
        time_scale: float = 1.0,
        frequencies: Sequence[float] | None = None,
        phases: Sequence[float] | None = None,
        dtype: str | jnp.dtype = "float32",
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(image_size=image_size, in_channels=in_channels, channels=channels)
        layers.check_positive(blocks=blocks, head_channels=head_channels, clip=clip)
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"multipliers={tuple(multipliers)} must be whole numbers, 1 or more")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.multiple = 2 ** (len(multipliers) - 1)
        if image_size % self.multiple:
            raise ValueError(
                f"image_size={image_size} must be divisible by {self.multiple} "
                f"for {len(multipliers)} multipliers"
            )
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.num_classes, self.dropout, self.time_scale = num_classes, dropout, time_scale
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.dtype, self.remat = layers.float_dtype(dtype), named(remat)

        widths = [channels * multiplier for multiplier in multipliers]
        width = max(widths)
        self.frequencies = _fixed("frequencies", frequencies, widths[0], _quantiles)
        self.phases = _fixed("phases", phases, widths[0], _spread)
        self.noise = MPLinear(widths[0], width, rngs=rngs)
        self.label = MPLinear(num_classes, width, rngs=rngs) if num_classes else None

        make = functools.partial(
            Block,
            width=width,
            head_channels=head_channels,
            dropout=dropout,
            balance=(residual_balance, attention_balance),
            clip=clip,
            dtype=self.dtype,
            rngs=rngs,
        )
        attends = [image_size >> level in attention_sizes for level in range(len(widths))]
        # A channel of ones takes the place of the first convolution's bias.
        self.stem = MPConv(in_channels + 1, widths[0], 3, dtype=self.dtype, rngs=rngs)
        now, skips, encoder, decoder = widths[0], [widths[0]], [], []
        for level, channels_out in enumerate(widths):
            resample = None
            if level > 0:
                resample = make(now, now, side="encoder", resample="down")
                skips.append(now)
            stage = []
            for _ in range(blocks):
                stage.append(make(now, channels_out, side="encoder", attend=attends[level]))
                now = channels_out
                skips.append(now)
            encoder.append(Stage(stage, resample))
        self.encoder = nnx.List(encoder)
        make = functools.partial(make, side="decoder")
        self.middle = nnx.List([make(now, now, attend=True), make(now, now)])
        for level, channels_out in reversed(list(enumerate(widths))):
            resample = make(now, now, resample="up") if level < len(widths) - 1 else None
            stage = []
            for _ in range(blocks + 1):
                stage.append(make(now + skips.pop(), channels_out, attend=attends[level]))
                now = channels_out
            decoder.append(Stage(stage, resample))
        self.decoder = nnx.List(decoder)
        self.out = MPConv(now, self.out_channels, 3, dtype=self.dtype, rngs=rngs)
        self.gain = param(rngs, (), zeros)

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
        embedding = self.embed(t, cond)
        keys = iter(())
        if key is not None and self.dropout:
            stages = [*self.encoder, *self.decoder]
            number = len(self.middle) + sum(1 + len(stage.blocks) for stage in stages)
            keys = iter(jax.random.split(key, number))

        def apply(block: nnx.Module, h: jax.Array) -> jax.Array:
            return run(block, h, embedding, next(keys, None), remat=self.remat)

        h = self.stem(jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1))
        skips = [h]
        for stage in self.encoder:
            if stage.resample is not None:
                h = apply(stage.resample, h)
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
                h = apply(block, mp_cat(h, skips.pop(), self.concat_balance))
        return self.out(h, self.gain[...]).astype(jnp.float32)

    def embed(self, t: jax.Array, cond: Mapping[str, jax.Array]) -> jax.Array:
        """The vector that conditions every block, [B, width], float32 of unit magnitude."""
        angles = self.time_scale * t.astype(jnp.float32)[:, None] * np.float32(self.frequencies)
        # Equation 75.
        c = self.noise(math.sqrt(2) * jnp.cos(angles + np.float32(self.phases)))
        if self.label is not None:
            hot = math.sqrt(self.num_classes) * jax.nn.one_hot(cond["label"], self.num_classes)
            c = mp_sum(c, self.label(hot), self.label_balance)
        return mp_silu(c)


def _fixed(name: str, given: Sequence[float] | None, count: int, default) -> tuple[float, ...]:
    values = tuple(map(float, default(count) if given is None else given))
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, needs {count}")
    return values


def _quantiles(count: int) -> list[float]:
    """Of |2 pi N(0, 1)|; the sign of a frequency makes no difference where the phase is random."""
    return [2 * math.pi * NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)]


def _spread(count: int) -> list[float]:
    """Multiples of the golden angle: evenly spread over any run of neighbouring frequencies."""
    golden = (math.sqrt(5) - 1) / 2
    return [2 * math.pi * ((i + 0.5) * golden % 1.0) for i in range(count)]


#: Channels and dropout of the published sizes.
SIZES: Mapping[str, tuple[int, float]] = {
    "XXS": (64, 0.0), "XS": (128, 0.0), "S": (192, 0.0), "M": (256, 0.1), "L": (320, 0.1),
    "XL": (384, 0.1), "XXL": (448, 0.1),
}  # fmt: skip


def edm2_imagenet(name: str = "img512-S", **changes) -> dict:
    """Fields of a published EDM2: "img512-XXS" to "img512-XXL", "img64-XS" to "img64-XL".

    "img512" runs on the 64 x 64 latents with 4 channels of 512 px images, "img64" on pixels; both
    know ImageNet's 1000 classes.

    Raises:
        UserError: if there is no such size.
    """
    names = [f"img512-{size}" for size in SIZES]
    names += [f"img64-{size}" for size in SIZES if size not in ("XXS", "XXL")]
    data, size = choose("edm2_imagenet name", name, names).split("-")
    channels, dropout = SIZES[size]
    fields = {"image_size": 64, "in_channels": 4 if data == "img512" else 3, "num_classes": 1000}
    return fields | {"channels": channels, "dropout": dropout} | changes
