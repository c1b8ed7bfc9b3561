"""Thresholding: keeps the predicted image inside its range (Saharia et al. 2022, section 2.3)."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.base import Guided
from jdiff.predictions import Prediction, from_x0
from jdiff.pytree import Array, PyTree, broadcast_time, struct


@struct
class Threshold(Guided):
    """The denoiser that `static_threshold` and `dynamic_threshold` make."""

    denoiser: Any
    limit: Array | float
    quantile: Array | float | None

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """The wrapped prediction with x0 clipped, and eps recomputed to agree with x."""
        t = broadcast_time(t, x)
        raw = self.denoiser(x, t, cond)
        x0 = jax.tree.map(self._clip, raw.x0)
        eps = from_x0(schedule_of(self.denoiser), x, x0, t).eps
        return raw._replace(x0=x0, eps=eps)

    def _clip(self, x0: Array) -> Array:
        if self.quantile is None:
            return jnp.clip(x0, -self.limit, self.limit)
        axes = tuple(range(1, x0.ndim))
        s = jnp.quantile(jnp.abs(x0), self.quantile, axis=axes, keepdims=True)
        s = jnp.maximum(s, self.limit)
        return jnp.clip(x0, -s, s) * (self.limit / s)


def static_threshold(denoise: Any, limit: Array | float = 1.0) -> Threshold:
    """Clips x0 to [-limit, limit]; eps is recomputed (DDPM's clip_denoised)."""
    denoise = as_denoiser(denoise)
    schedule_of(denoise, where="static_threshold")
    return Threshold(denoise, limit, None)


def dynamic_threshold(
    denoise: Any, quantile: Array | float = 0.995, limit: Array | float = 1.0
) -> Threshold:
    """Clips x0 to its own `quantile` of |x0|, per sample, and scales that back to `limit`.

    A sample whose quantile is within the limit is clipped to the limit and not scaled. Imagen's
    quantile is 0.995.

    Raises:
      UserError: the quantile lies outside (0, 1], or the denoiser has no schedule.
    """
    if isinstance(quantile, int | float) and not 0 < quantile <= 1:
        raise UserError(f"dynamic_threshold: quantile={quantile} given; it lies in (0, 1].")
    denoise = as_denoiser(denoise)
    schedule_of(denoise, where="dynamic_threshold")
    return Threshold(denoise, limit, quantile)
