"""Layers that the networks share: linear, convolution, norms, embeddings, resampling.

Weights are float32 and cast to the layer's `dtype` where they are used; statistics of norms,
softmax and embeddings of time are float32 whatever the `dtype`. Images are [B, H, W, C], kernels
[H, W, C_in, C_out].
"""

import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.models.initializers import Axes, Init, ones, param, zeros
from jdiff.models.module import Module
from jdiff.models.remat import checkpoint, named
from jdiff.parallel.fetch import fetch, fetches
from jdiff.parallel.tokens import parts


class Linear(Module):
    """`x @ kernel + bias` on the last axis, in `dtype`; `axes` are the kernel's logical axes.

    With features_out = (n, m) it is n maps in one product, [..., in] to [..., n, m]. The parts have
    an axis of their own, so that each can be split over devices: q, k and v head by head.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int | tuple[int, int],
        *,
        init: Init,
        bias_init: Init | None = zeros,
        axes: Axes | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        out = features_out if isinstance(features_out, tuple) else (features_out,)
        axes = (None,) * (1 + len(out)) if axes is None else axes
        self.kernel = param(rngs, (features_in, *out), init, axes)
        bias = functools.partial(param, rngs, out, axes=axes[1:])
        self.bias = None if bias_init is None else bias(bias_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., features_in] to [..., features_out]."""
        kernel = self.kernel.fetched(lambda w: w.astype(self.dtype))
        x = jnp.tensordot(x.astype(self.dtype), kernel, 1)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


def together(x: jax.Array, *maps: Linear) -> list[jax.Array]:
    """[y(x) for y in maps], all of one width; of n maps in one there are n results.

    Where the layout splits their results over devices it is one product, so that its gradient by x
    is summed over the devices once, not once a map.
    """
    axes = maps[0].kernel.get_metadata().get("axes") or (None,)
    if parts(axes[-1]) == 1:
        found = [y(x) for y in maps]
        return [b for a in found for b in ([a] if a.ndim == x.ndim else jnp.unstack(a, axis=-2))]
    dtype, width = maps[0].dtype, maps[0].kernel.shape[-1]
    kernels = [y.kernel.get_value() for y in maps]
    kernel = jnp.concatenate([w.reshape(len(w), -1, width) for w in kernels], 1, dtype=dtype)
    kernel = fetch(kernel, (axes[-kernels[0].ndim], None, axes[-1]))
    y = jnp.tensordot(x.astype(dtype), kernel, 1)
    if maps[0].bias is not None:
        y = y + jnp.concatenate([y.bias[...].reshape(-1, width) for y in maps], dtype=dtype)
    return jnp.unstack(y, axis=-2)


class Conv(Module):
    """A square convolution of [B, H, W, C], in `dtype`; `padding` "SAME" or pixels a side.

    With `groups`, as many sets of neighbouring channels are convolved apart.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        init: Init,
        bias_init: Init | None = zeros,
        stride: int = 1,
        padding: str | int = "SAME",
        groups: int = 1,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding, self.dtype = stride, padding, jnp.dtype(dtype)
        self.groups = groups
        axes = (None, None, "channels_in" if groups == 1 else None, "channels_out")
        self.kernel = param(rngs, (size, size, channels_in // groups, channels_out), init, axes)
        bias = functools.partial(param, rngs, (channels_out,), axes=axes[3:])
        self.bias = None if bias_init is None else bias(bias_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve [B, H, W, channels_in] to [B, H', W', channels_out]."""
        padding = self.padding
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.fetched(lambda w: w.astype(self.dtype)),
            window_strides=(self.stride, self.stride),
            padding=padding if isinstance(padding, str) else [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class GroupNorm(Module):
    """Group normalisation over space and groups of channels, with a scale and a bias a channel.

    There are `groups` groups; if that is None, min(32, channels / 4) as in the EDM and ADM code or,
    where that does not divide the channels, the next smaller number that does.

    Raises:
        ValueError: if `groups` does not divide the channels.
    """

    def __init__(self, channels: int, *, eps: float, groups: int | None = None, rngs: nnx.Rngs):
        self.eps, self.groups = eps, groups or group_count(channels)
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"groups={groups} does not divide channels={channels}")
        self.scale = param(rngs, (channels,), ones)
        self.bias = param(rngs, (channels,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [B, H, W, C] in float32; the result has the dtype of `x`."""
        y = group_norm(x, self.scale[...], self.bias[...], groups=self.groups, eps=self.eps)
        return y.astype(x.dtype)


def group_count(channels: int) -> int:
    """The largest divisor of `channels` that is at most min(32, channels / 4), at least 1."""
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, groups: int, eps: float
) -> jax.Array:
    """Group normalisation of [B, H, W, C] with statistics in float32; returns float32.

    The sums run over space first and over the channels of a group on the small [B, C] rest, so the
    image is never reshaped: on CPU 3 times faster than reducing a [B, H, W, G, C / G] view. The
    variance takes a second pass, since E[x^2] - E[x]^2 cancels where the mean is large.
    """

    def over_group(sums: jax.Array) -> jax.Array:
        means = sums.reshape(sums.shape[0], groups, -1).mean(axis=-1)
        return jnp.repeat(means, sums.shape[1] // groups, axis=1)[:, None, None, :]

    x = x.astype(jnp.float32)
    centred = x - over_group(x.mean(axis=(1, 2)))
    variance = over_group(jnp.square(centred).mean(axis=(1, 2)))
    return centred * (jax.lax.rsqrt(variance + eps) * scale) + bias


def layer_norm(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Normalise the last axis, without learned scale or bias; float32 inside, dtype of `x` out."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class LayerNorm(Module):
    """Normalisation of the last axis with a learned scale and bias; statistics in float32."""

    def __init__(self, width: int, *, eps: float = 1e-5, bias: bool = True, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (width,), ones)
        self.bias = param(rngs, (width,), zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] to the same; the dtype of `x`."""
        y = layer_norm(x.astype(jnp.float32), eps=self.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RMSNorm(Module):
    """x / sqrt(mean x^2 + eps) over the last axis, times a learned scale; float32 inside.

    A learned `bias` is added, if asked for.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, bias: bool = False, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (width,), ones)
        self.bias = param(rngs, (width,), zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] to the same; the dtype of `x`."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def sinusoidal(
    t: jax.Array,
    channels: int,
    *,
    order: str = "cos_sin",
    endpoint: bool = False,
    max_period: float = 10_000.0,
    scale: float = 1.0,
) -> jax.Array:
    """Sinusoids of scale * t at geometric frequencies, always float32: [B] to [B, channels].

    The frequencies fall from 1 towards 1 / max_period, which the last one reaches if `endpoint`.
    `order` "cos_sin" without endpoint is that of ADM and DiT; "sin_cos" with endpoint that of DDPM
    (Vaswani et al. 2017 as written in tensor2tensor), which EDM's DDPM++ arrives at by swapping.
    """
    half = channels // 2
    exponents = np.arange(half) / (half - 1 if endpoint else half)
    return _waves(scale * t.astype(jnp.float32), max_period**-exponents, order)


def fourier(t: jax.Array, frequencies: Sequence[float], *, order: str = "sin_cos") -> jax.Array:
    """cos and sin of 2 pi f t (Tancik et al. 2020), always float32: [B] to [B, 2 F]."""
    return _waves(t.astype(jnp.float32), 2 * np.pi * np.asarray(frequencies), order)


def gaussian_frequencies(count: int, scale: float = 16.0) -> tuple[float, ...]:
    """`count` frequencies distributed as |N(0, scale^2)|: its quantiles, so no random stream.

    NCSN++ draws them once and keeps them fixed. The sign of a frequency only flips the sign of its
    sine, which the next linear layer absorbs.
    """
    levels = (np.arange(count) + 0.5) / count
    return tuple(scale * NormalDist().inv_cdf(0.5 + 0.5 * float(level)) for level in levels)


def _waves(t: jax.Array, frequencies: np.ndarray, order: str) -> jax.Array:
    angles = t[:, None] * frequencies.astype(np.float32)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([sin, cos] if order == "sin_cos" else [cos, sin], axis=-1)


def grid_embedding(
    height: int, width: int, channels: int, spacing: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """Fixed sin-cos embedding of a grid, row by row: [height * width, channels] float32.

    The first half of the channels encodes the column, the second half the row, each as sines then
    cosines of the index (He et al. 2022, MAE; used by DiT) times the `spacing` of rows and columns.

    Raises:
        ValueError: if `channels` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"width={channels} must be a multiple of 4 for the sin-cos grid embedding")
    frequencies = 10_000.0 ** -(np.arange(channels // 4) / (channels // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    places = columns * spacing[1], rows * spacing[0]
    halves = [place[:, None] * frequencies for place in places]
    parts = [wave(half) for half in halves for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def upsample(x: jax.Array, taps: Sequence[float] = (1, 1)) -> jax.Array:
    """Double [B, H, W, C] along height and width; constants stay constant (but at the border).

    Zeros are inserted between the pixels and the image is filtered with `taps` (an even number of
    them), normalised to sum 2 an axis. (1, 1) repeats each pixel.
    """
    taps = [2 * tap / sum(taps) for tap in taps]
    margin = len(taps) // 2
    for axis in (1, 2):
        size = x.shape[axis]
        padded = _pad(x, axis, margin)
        phases = []
        for phase in (0, 1):
            # Output 2 m + phase takes tap k from input m + (phase + pad - k) / 2.
            offsets = [
                (tap, (phase + margin - 1 - k) // 2)
                for k, tap in enumerate(taps)
                if (phase + margin - 1 - k) % 2 == 0
            ]
            phases.append(
                sum(
                    tap * jax.lax.slice_in_dim(padded, margin + o, margin + o + size, axis=axis)
                    for tap, o in offsets
                )
            )
        shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
        x = jnp.stack(phases, axis=axis + 1).reshape(shape)
    return x


def downsample(x: jax.Array, taps: Sequence[float] = (1, 1), *, pad: bool = True) -> jax.Array:
    """Halve [B, H, W, C] along height and width: filter with `taps` (sum 1) and keep every second.

    (1, 1) averages 2 x 2 pixels. With `pad` the border is padded with zeros so that H and W are
    halved exactly; without, the caller's convolution has supplied the margin.
    """
    taps = [tap / sum(taps) for tap in taps]
    margin = len(taps) // 2 - 1 if pad else 0
    for axis in (1, 2):
        padded = _pad(x, axis, margin)
        size = (padded.shape[axis] - len(taps)) // 2 + 1
        x = sum(
            tap * jax.lax.slice_in_dim(padded, k, k + 2 * size - 1, stride=2, axis=axis)
            for k, tap in enumerate(taps)
        )
    return x


def _pad(x: jax.Array, axis: int, margin: int) -> jax.Array:
    widths = [(margin, margin) if a == axis else (0, 0) for a in range(x.ndim)]
    return jnp.pad(x, widths) if margin else x


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero entries with probability `rate` and scale the rest; the identity if `key` is None."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def expand(c: jax.Array, h: jax.Array) -> jax.Array:
    """[B, C] with axes of size one in the middle, to broadcast against h [B, *grid, C']."""
    return c.reshape(c.shape[0], *(1,) * (h.ndim - 2), c.shape[-1])


class ResidualBlock(Module):
    """A block h -> h + f(h, ...): one that guidance may skip (`jdiff.models.replace`)."""


def run(
    module: nnx.Module, *inputs: jax.Array | None, remat: bool | str, scanned: bool = False
) -> jax.Array:
    """`module(*inputs)`, keeping for the backward pass what the policy `remat` says.

    See `jdiff.models.remat`; True recomputes everything. `scanned`: it is the body of a scan.
    """
    if named(remat) == "none" and not fetches():
        return module(*inputs)
    graphdef, state = nnx.split(module)
    call = lambda state, *args: nnx.merge(graphdef, state)(*args)
    return checkpoint(call, remat, scanned=scanned)(state, *inputs)


def check_inputs(
    network: nnx.Module,
    x: jax.Array,
    t: jax.Array,
    cond: dict,
    *,
    in_channels: int,
    multiple: int,
    reason: str,
    num_classes: int,
) -> None:
    """Raise a ValueError that names the field, if the inputs do not fit the network.

    Checks shapes and dtypes, which jit knows, and no values.
    """
    name = type(network).__name__
    if x.ndim != 4 or x.shape[-1] != in_channels:
        raise ValueError(
            f"{name} with in_channels={in_channels} takes x of shape [B, H, W, {in_channels}], "
            f"not {list(x.shape)}"
        )
    height, width = x.shape[1:3]
    if height % multiple or width % multiple:
        nearest = [max(multiple, multiple * round(side / multiple)) for side in (height, width)]
        raise ValueError(
            f"{name} takes a height and width divisible by {multiple} ({reason}), "
            f"not {height} x {width}; the nearest is {nearest[0]} x {nearest[1]}"
        )
    if t.shape != x.shape[:1]:
        raise ValueError(f"{name} takes t of shape [B] = [{x.shape[0]}], not {list(t.shape)}")
    if not num_classes:
        return
    if "label" not in cond:
        raise ValueError(
            f"{name} with num_classes={num_classes} needs cond['label']: integers [B] from 0 to "
            f"{num_classes}, where {num_classes} stands for no label; cond has {sorted(cond)}"
        )
    label = cond["label"]
    if label.shape != x.shape[:1] or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(
            f"{name} takes cond['label'] as integers of shape [B] = [{x.shape[0]}], "
            f"not {label.dtype} {list(label.shape)}"
        )


def entry(
    network: nnx.Module, cond: Mapping[str, jax.Array], name: str, shape: tuple[int | str, ...]
) -> jax.Array:
    """cond[name], of this shape; letters stand for any size.

    Raises:
        ValueError: if it is missing or has another shape.
    """
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    who = type(network).__name__
    if name not in cond:
        raise ValueError(f"{who} needs cond[{name!r}] of shape {wanted}; cond has {sorted(cond)}")
    given = cond[name].shape
    if len(given) != len(shape) or any(
        isinstance(want, int) and want != size for want, size in zip(shape, given)
    ):
        raise ValueError(f"{who} takes cond[{name!r}] of shape {wanted}, not {list(given)}")
    return cond[name]


def check_heads(heads: int, channels: int, where: str) -> int:
    """`heads`, if it divides `channels`; otherwise a ValueError with the numbers that would."""
    if heads < 1 or channels % heads:
        fitting = [
            h for h in range(1, channels + 1) if channels % h == 0 and h <= 4 * max(heads, 1)
        ]
        raise ValueError(f"heads={heads} does not divide {where}={channels}; these do: {fitting}")
    return heads


def float_dtype(dtype: str | jnp.dtype) -> jnp.dtype:
    """The floating-point dtype of that name, or a ValueError."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
    return found


def check_positive(**fields: float) -> None:
    """Raise a ValueError that names the first field which is not positive."""
    for name, value in fields.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be positive")
