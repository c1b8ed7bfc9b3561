"""Layers that keep the magnitude of what passes through them (Karras et al. 2024, EDM2).

Every weight is used normalised, so that a layer maps uncorrelated inputs of unit magnitude to
outputs of unit magnitude whatever the length of the weight; sums, concatenations and nonlinearities
are scaled to preserve it too. Since only the direction of a weight counts, training keeps its
length fixed: see `normalize`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jdiff.models.initializers import Axes, normal, param
from jdiff.models.module import Module


def unit(x: jax.Array, axis: int | Sequence[int] = -1, eps: float = 1e-4) -> jax.Array:
    """x over its root mean square along `axis` (equation 66's normalize), in float32; dtype of x.

    `eps` is added to the magnitude, as the published weights expect.
    """
    magnitude = jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean(axis=axis, keepdims=True))
    return (x / (eps + magnitude)).astype(x.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
    """silu(x) / 0.596, of unit magnitude for x from N(0, 1) (equation 81)."""
    return jax.nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
    """The mean of a and b with weights 1 - t and t, scaled to unit magnitude (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
    """a and b on the last axis; they contribute (1 - t) : t in magnitude (equation 103)."""
    n, m = a.shape[-1], b.shape[-1]
    scale = math.sqrt(n + m) / math.hypot(1 - t, t)
    return jnp.concatenate(
        [scale * (1 - t) / math.sqrt(n) * a, scale * t / math.sqrt(m) * b], axis=-1
    )


def normalize(params: Any) -> Any:
    """The same network with every weight of unit root mean square (equation 66).

    A pure function to apply to the params after each step of the optimiser: the forced weight
    normalisation of EDM2, without which weights grow and the learning rate decays unseen. The
    outputs do not change (but for the 1e-4 in `unit`). Gains are left as they are.
    """

    def of(path: tuple, w: jax.Array) -> jax.Array:
        return unit(w, tuple(range(w.ndim - 1))) if path[-1].key == "kernel" else w

    return jax.tree_util.tree_map_with_path(of, params)


def normalized(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser with `normalize` applied to the params after each of its steps."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        new = normalize(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformation(optimizer.init, update)


class MPLinear(Module):
    """x times a kernel of which each output's column has length 1 (equation 47); no bias."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        axes: Axes = (None, None),
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.kernel = param(rngs, (features_in, features_out), normal(1.0), axes)

    def __call__(self, x: jax.Array, gain: float | jax.Array = 1.0) -> jax.Array:
        """Map [..., features_in] to [..., features_out], times `gain`."""
        kernel = self.kernel.fetched(lambda w: _weight(w, gain).astype(self.dtype))
        return x.astype(self.dtype) @ kernel


class MPConv(Module):
    """A square convolution whose kernel has length 1 for each output channel; no bias."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        axes = (None, None, "channels_in", "channels_out")
        self.kernel = param(rngs, (size, size, channels_in, channels_out), normal(1.0), axes)

    def __call__(self, x: jax.Array, gain: float | jax.Array = 1.0) -> jax.Array:
        """Convolve [B, H, W, channels_in] to [B, H, W, channels_out], times `gain`."""
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.fetched(lambda w: _weight(w, gain).astype(self.dtype)),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def _weight(w: jax.Array, gain: float | jax.Array) -> jax.Array:
    return unit(w, tuple(range(w.ndim - 1))) * (gain / math.sqrt(w[..., 0].size))
