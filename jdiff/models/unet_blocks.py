"""The blocks of the U-Nets, and the choices in which the published families differ.

Sources: DDPM (Ho et al. 2020), iDDPM (Nichol and Dhariwal 2021), and DDPM++, NCSN++ (Song et al.
2021) and ADM (Dhariwal and Nichol 2021) as configured by EDM (Karras et al. 2022, appendix F.2).
Of SR3 (Saharia et al. 2021, section 2.3) no code is published: BigGAN's residual blocks in DDPM's
U-Net, residual sums scaled by sqrt(1/2); the rest is as in iDDPM.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.attention import Attention
from jdiff.models.initializers import Init, kaiming_uniform, xavier_uniform, zeros
from jdiff.models.layers import Conv, GroupNorm, Linear
from jdiff.models.module import Module
from jdiff.models.text_attention import TextKeys


@dataclasses.dataclass(frozen=True)
class Style:
    """The choices in which the published U-Nets differ."""

    time: Literal["sin_cos", "cos_sin", "fourier"]
    """Embedding of t: sines first, with endpoint (DDPM); cosines first (ADM); Fourier features."""
    time_width: int = 1
    """Channels of that embedding, in units of `channels`."""
    label: Literal["before", "after"] = "before"
    """Whether the label is added before the time MLP or to its output."""
    scale_shift: bool = False
    """Whether the embedding scales and shifts the second norm, or is added ahead of it."""
    skip_scale: float = 1.0
    """Factor on each residual sum; sqrt(1/2) keeps its variance."""
    eps: float = 1e-6
    """Added to the variance in group normalisation."""
    groups: int | None = None
    """Groups of group normalisation; None for min(32, channels / 4)."""
    heads: int | None = 1
    """Attention heads; None for as many as have `head_channels` channels."""
    head_channels: int = 64
    decoder_attention: Literal["last", "all"] = "all"
    """Which decoder blocks of an attention resolution attend."""
    resample: Literal["block", "conv"] = "block"
    """Change resolution in a residual block, or with a convolution alone (DDPM)."""
    down_padding: str | int = "SAME"
    """Of the strided convolution of "conv": "SAME" pads after the image only, 1 on both sides."""
    taps: tuple[float, ...] = (1, 1)
    """Resampling filter of "block"."""
    project_resampled: bool = True
    """Whether the skip path of a resampling block has a 1 x 1 convolution."""
    wide_stem: bool = False
    """Whether the first convolution has the width of the first level, or `channels`."""
    residual_encoder: bool = False
    """Add the downsampled input image to every level (NCSN++)."""
    init: Literal["ddpm", "song", "adm"] = "song"
    """Initialisation, a name in `INITS`."""


STYLES: Mapping[str, Style] = {
    "ddpm": Style(time="sin_cos", resample="conv", init="ddpm"),
    "ddpmpp": Style(time="sin_cos", skip_scale=math.sqrt(0.5), decoder_attention="last"),
    "ncsnpp": Style(
        time="fourier",
        time_width=2,
        skip_scale=math.sqrt(0.5),
        decoder_attention="last",
        taps=(1, 3, 3, 1),
        residual_encoder=True,
    ),
    "adm": Style(
        time="cos_sin",
        label="after",
        scale_shift=True,
        eps=1e-5,
        heads=None,
        project_resampled=False,
        wide_stem=True,
        init="adm",
    ),
    "iddpm": Style(
        time="cos_sin",
        label="after",
        scale_shift=True,
        eps=1e-5,
        heads=4,
        resample="conv",
        down_padding=1,
        init="adm",
    ),
    "sr3": Style(
        time="cos_sin",
        label="after",
        scale_shift=True,
        skip_scale=math.sqrt(0.5),
        eps=1e-5,
        init="adm",
    ),
}


def named_style(name: str) -> Style:
    """The entry of `STYLES`, or an error that offers the nearest."""
    return STYLES[choose("UNet style", name, STYLES)]


class Block(layers.ResidualBlock):
    """A residual block, optionally resampling on its way in and attending on its way out."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        width: int,
        dropout: float,
        style: Style,
        attend: bool = False,
        text_width: int = 0,
        resample: Literal["up", "down"] | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.style, self.dropout, self.resample = style, dropout, resample
        inits = INITS[style.init]
        conv = functools.partial(inits.conv, dtype=dtype, rngs=rngs)
        norm = functools.partial(GroupNorm, eps=style.eps, groups=style.groups, rngs=rngs)
        self.norm1 = norm(channels_in)
        self.conv1 = conv(channels_in, channels_out, 3)
        self.affine = inits.linear(width, channels_out * (1 + style.scale_shift), rngs=rngs)
        self.norm2 = norm(channels_out)
        self.conv2 = conv(channels_out, channels_out, 3, zero=True)
        project = channels_in != channels_out or (resample and style.project_resampled)
        self.skip = conv(channels_in, channels_out, 1) if project else None

        heads = style.heads or max(1, channels_out // style.head_channels)
        self.attention = Attention(heads) if attend else None
        if attend:
            layers.check_heads(heads, channels_out, "channels")
            self.norm3 = norm(channels_out)
            self.qkv = conv(channels_out, 3 * channels_out, 1, gain=inits.qkv_gain)
            self.project = conv(channels_out, channels_out, 1, zero=True)
        keys = functools.partial(TextKeys, text_width, channels_out, dtype=dtype, rngs=rngs)
        self.text = keys() if attend and text_width else None

    def __call__(
        self,
        x: jax.Array,
        embedding: jax.Array,
        key: jax.Array | None,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """[B, H, W, channels_in] to [B, H', W', channels_out]; `embedding` [B, width] float32.

        With a `text_width`, pixels that attend see `text` [B, L, text_width] too, by its `mask`.
        """
        s = self.style
        h = self.conv1(self._resampled(jax.nn.silu(self.norm1(x))))
        affine = self.affine(embedding)[:, None, None, :].astype(h.dtype)
        if s.scale_shift:
            scale, shift = jnp.split(affine, 2, axis=-1)
            h = jax.nn.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = jax.nn.silu(self.norm2(h + affine))
        h = self.conv2(layers.dropout(h, self.dropout, key))
        x = self._resampled(x)
        x = (h + (x if self.skip is None else self.skip(x))) * s.skip_scale
        if self.attention is not None:
            qkv, places = self.qkv(self.norm3(x)), None
            q, pairs = jnp.split(qkv, [x.shape[-1]], axis=-1)
            if self.text is not None:
                pairs, places = self.text(pairs, text, mask)
            k, v = jnp.split(pairs, 2, axis=-1)
            x = (x + self.project(self.attention(q, k, v, places))) * s.skip_scale
        return x

    def _resampled(self, x: jax.Array) -> jax.Array:
        if self.resample == "up":
            return layers.upsample(x, self.style.taps)
        return layers.downsample(x, self.style.taps) if self.resample == "down" else x


class ConvResample(Module):
    """DDPM's change of resolution: a strided convolution, or one after repeating the pixels."""

    def __init__(self, direction: Literal["up", "down"], conv: Conv):
        self.direction, self.conv = direction, conv

    def __call__(self, x: jax.Array, *rest: jax.Array | None) -> jax.Array:
        """[B, H, W, C] to double or half the height and width."""
        return self.conv(layers.upsample(x) if self.direction == "up" else x)


def resample_layer(direction: str, channels: int, style: Style, block, conv) -> nnx.Module:
    """What changes the resolution of a style, made with the given makers of blocks and convs."""
    if style.resample == "block":
        return block(channels, channels, resample=direction)
    if direction == "up":
        return ConvResample("up", conv(channels, channels, 3))
    return ConvResample("down", conv(channels, channels, 3, stride=2, padding=style.down_padding))


@dataclasses.dataclass(frozen=True)
class Inits:
    """An initialisation: Glorot's with zero biases, or PyTorch's default with uniform ones."""

    uniform_bias: bool
    zero_gain: float  # of layers that end a residual branch or the network
    qkv_gain: float = 1.0

    def kernel(self, fan_in: int, fan_out: int, gain: float = 1.0) -> Init:
        """The rule of a kernel."""
        if self.uniform_bias:
            return kaiming_uniform(fan_in, gain * math.sqrt(1 / 3))
        return xavier_uniform(fan_in, fan_out, gain)

    def bias(self, fan_in: int, gain: float = 1.0) -> Init:
        """The rule of a bias."""
        return self.kernel(fan_in, fan_in, gain) if self.uniform_bias else zeros

    def linear(self, features_in: int, features_out: int, *, rngs: nnx.Rngs) -> Linear:
        """A linear layer in float32, for the embedding."""
        init, bias_init = self.kernel(features_in, features_out), self.bias(features_in)
        return Linear(features_in, features_out, init=init, bias_init=bias_init, rngs=rngs)

    def conv(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        zero: bool = False,
        gain: float = 1.0,
        **kwargs,
    ) -> Conv:
        """A convolution; `zero` for one that ends a residual branch or the network."""
        gain = self.zero_gain if zero else gain
        fan_in, fan_out = channels_in * size**2, channels_out * size**2
        rules = {"init": self.kernel(fan_in, fan_out, gain), "bias_init": self.bias(fan_in, gain)}
        return Conv(channels_in, channels_out, size, **rules, **kwargs)


INITS = {
    "ddpm": Inits(uniform_bias=False, zero_gain=0.0),
    "song": Inits(uniform_bias=False, zero_gain=1e-5, qkv_gain=math.sqrt(0.2)),
    "adm": Inits(uniform_bias=True, zero_gain=0.0),
}
