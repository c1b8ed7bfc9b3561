"""The blocks of DC-AE (Chen et al., 2024): steps between sizes, and EfficientViT's blocks.

EfficientViT (Cai et al., 2023) attends in linear time, relu(q) relu(k)^T v over the sum of the
weights, and has a gated MLP with a depthwise convolution.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import choose
from jdiff.models import layers
from jdiff.models.initializers import kaiming_uniform, ones, param, zeros
from jdiff.models.layers import Conv, Linear, ResidualBlock, RMSNorm, together
from jdiff.models.module import Module

#: Activations by name.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
_GAIN = math.sqrt(1 / 3)  # of PyTorch's layers


def conv(channels_in: int, channels_out: int, size: int = 3, **kwargs) -> Conv:
    """A convolution that starts as PyTorch's do."""
    groups = kwargs.get("groups", 1)
    init = kaiming_uniform(size**2 * channels_in // groups, _GAIN)
    return Conv(channels_in, channels_out, size, init=init, **kwargs)


def linear(features_in: int, features_out: int | tuple[int, int], **kwargs) -> Linear:
    """A linear layer that starts as PyTorch's do."""
    return Linear(features_in, features_out, init=kaiming_uniform(features_in, _GAIN), **kwargs)


def fold(x: jax.Array) -> jax.Array:
    """[B, 2 H, 2 W, C] to [B, H, W, C, 4]: the pixels of each square, row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, channels, 4)


def unfold(x: jax.Array) -> jax.Array:
    """[B, H, W, 4 C] to [B, 2 H, 2 W, C]: four neighbouring channels are a square's pixels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def average(x: jax.Array, channels: int) -> jax.Array:
    """[..., n * channels] to [..., channels]: the means of n neighbouring channels."""
    return x.reshape(*x.shape[:-1], channels, -1).mean(axis=-1)


class BatchNorm(Module):
    """Normalisation of each channel by fixed statistics, those that its training ended with."""

    def __init__(self, channels: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (channels,), ones)
        self.bias = param(rngs, (channels,), zeros)
        self.mean = param(rngs, (channels,), zeros)
        self.variance = param(rngs, (channels,), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to the same; the dtype of `x`."""
        mean, variance = (jax.lax.stop_gradient(w[...]) for w in (self.mean, self.variance))
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


#: Norms by name: channels -> module.
NORMS: Mapping[str, Callable[..., Module]] = {
    "rms_norm": functools.partial(RMSNorm, eps=1e-5, bias=True),
    "batch_norm": BatchNorm,
}


class Residual(ResidualBlock):
    """Two convolutions and a norm beside the identity."""

    def __init__(
        self, channels: int, *, norm: str, activation: str, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.activation = ACTIVATIONS[choose("activation", activation, ACTIVATIONS)]
        self.conv1 = conv(channels, channels, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels, channels, bias_init=None, dtype=dtype, rngs=rngs)
        self.norm = NORMS[choose("norm", norm, NORMS)](channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class LinearAttention(ResidualBlock):
    """Multi-scale linear attention: heads of queries, keys and values, and blurred ones beside.

    A pixel sees sum_j (relu(q) . relu(k_j)) v_j over the sum of these weights, computed as
    relu(q) (sum_j relu(k_j) v_j^T): its cost is linear in the number of pixels.

    Args:
        head: channels of a head, a divisor of the channels.
        scales: sizes of the depthwise convolutions that make the further queries, keys and values.
    """

    def __init__(
        self,
        channels: int,
        *,
        head: int,
        scales: Sequence[int],
        norm: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.head = head
        inner = channels // head * head
        make = {"bias_init": None, "dtype": dtype, "rngs": rngs}
        self.qkv = linear(channels, (3, inner), **make)
        self.scales = nnx.List([Scale(3 * inner, size, head, **make) for size in scales])
        self.project = linear(inner * (1 + len(scales)), channels, **make)
        self.norm = NORMS[choose("norm", norm, NORMS)](channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        batch, height, width, _ = x.shape
        qkv = jnp.concatenate(together(x, self.qkv), axis=-1)
        qkv = jnp.concatenate([qkv, *(scale(qkv) for scale in self.scales)], axis=-1)
        # Three neighbouring heads of these channels are q, k and v, whatever their maps are called.
        qkv = qkv.reshape(batch, height * width, -1, 3, self.head).astype(jnp.float32)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        q, k = jax.nn.relu(q), jax.nn.relu(k)
        seen = jnp.einsum("bnhk,bnhv->bhkv", k, v)
        total = jnp.einsum("bnhk,bhk->bnh", q, k.sum(axis=1))
        y = jnp.einsum("bnhk,bhkv->bnhv", q, seen) / (total[..., None] + 1e-15)
        y = self.project(y.astype(x.dtype).reshape(batch, height, width, -1))
        return x + self.norm(y)


class Scale(Module):
    """Each channel blurred by its own kernel, then mixed within its head."""

    def __init__(self, channels: int, size: int, head: int, **make):
        self.blur = conv(channels, channels, size, groups=channels, **make)
        self.mix = conv(channels, channels, 1, groups=channels // head, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        return self.mix(self.blur(x))


class GatedMLP(ResidualBlock):
    """Four times as many channels, a depthwise convolution, and half of them as gates."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        wide, make = 8 * channels, {"dtype": dtype, "rngs": rngs}
        self.widen = linear(channels, wide, **make)
        self.blur = conv(wide, wide, groups=wide, **make)
        self.narrow = linear(wide // 2, channels, bias_init=None, **make)
        self.norm = NORMS["rms_norm"](channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        passed, gate = jnp.split(self.blur(jax.nn.silu(self.widen(x))), 2, axis=-1)
        return x + self.norm(self.narrow(passed * jax.nn.silu(gate)))


class EfficientViT(Module):
    """A block of EfficientViT: linear attention, then the gated MLP."""

    def __init__(
        self,
        channels: int,
        *,
        head: int,
        scales: Sequence[int],
        norm: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.attention = LinearAttention(channels, head=head, scales=scales, norm=norm, **make)
        self.mlp = GatedMLP(channels, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        return self.mlp(self.attention(x))


class Down(Module):
    """Sides halved by a convolution, with a stride or `folded`, beside the mean of the pixels."""

    def __init__(
        self, channels_in: int, channels_out: int, *, folded: bool, shortcut: bool = True, **make
    ):
        self.folded, self.shortcut, self.channels = folded, shortcut, channels_out
        if folded:
            self.conv = conv(channels_in, channels_out // 4, **make)
        else:
            self.conv = conv(channels_in, channels_out, stride=2, padding=1, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 2 H, 2 W, C] to [B, H, W, channels]."""
        y = self.conv(x)
        if self.folded:
            y = fold(y).reshape(*x.shape[:1], x.shape[1] // 2, x.shape[2] // 2, -1)
        if not self.shortcut:
            return y
        folded = fold(x)
        return y + average(folded.reshape(*folded.shape[:-2], -1), self.channels)


class Up(Module):
    """Sides doubled by a convolution, of repeated pixels or `unfolded`, beside the channels."""

    def __init__(
        self, channels_in: int, channels_out: int, *, unfolded: bool, shortcut: bool = True, **make
    ):
        self.unfolded, self.shortcut = unfolded, shortcut
        self.repeats = 4 * channels_out // channels_in
        self.conv = conv(channels_in, channels_out * (4 if unfolded else 1), **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, 2 H, 2 W, channels]."""
        y = unfold(self.conv(x)) if self.unfolded else self.conv(layers.upsample(x))
        return y + unfold(jnp.repeat(x, self.repeats, axis=-1)) if self.shortcut else y
