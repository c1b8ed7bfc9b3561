"""Classifier-free guidance (Ho and Salimans 2022), with interval and rescale."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.conditioning import with_null
from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.base import Guided, call_together, extrapolate
from jdiff.predictions import Prediction, from_x0
from jdiff.pytree import Array, PyTree, broadcast_time, expand, is_concrete, static, struct
from jdiff.schedules import first


@struct
class PerSample:
    """Names the entry of `cond` that holds a number for each sample."""

    entry: str = static()


def per_sample(entry: str = "scale") -> PerSample:
    """A guidance scale read from `cond[entry]` `[B]`, so that it is chunked with the samples."""
    return PerSample(entry)


@struct
class CFG(Guided):
    """The guided denoiser that `cfg` makes. Leaves: denoiser, scale, null, interval, rescale."""

    denoiser: Any
    scale: Array | float | PerSample
    null: PyTree
    interval: tuple[Any, Any] | None
    rescale: Array | float | None

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]`, cond with the entries that null names -> guided prediction."""
        t = broadcast_time(t, x)
        cond = dict(cond or {})
        w = cond.pop(self.scale.entry) if isinstance(self.scale, PerSample) else self.scale
        null = with_null(cond, self.null)
        good, bad = call_together(self.denoiser, x, t, [cond, null])
        if self.interval is not None:
            low, high = self.interval
            logsnr = first(schedule_of(self.denoiser)).logsnr(t)
            w = jnp.where((low < logsnr) & (logsnr <= high), w, 1.0)
        guided = extrapolate(bad, good, w)
        if self.rescale is None:
            return guided
        x0 = jax.tree.map(lambda g, c: _rescale(g, c, self.rescale), guided.x0, good.x0)
        return from_x0(schedule_of(self.denoiser), x, x0, t)


def cfg(
    denoise: Any, scale: Array | float | PerSample, null: dict[str, PyTree], *,
    interval: tuple[Any, Any] | None = None, rescale: Array | float | None = None,
) -> CFG:  # fmt: skip
    """Classifier-free guidance: null + scale (conditional - null).

    scale = 1 is the conditional model, 0 the unconditional one; Ho and Salimans' w is scale - 1.

    Args:
      denoise: a denoiser whose `cond` holds the entries of `null`.
      scale: a number, `[B]`, or `per_sample("scale")` to read `cond["scale"]`.
      null: the value of each guided entry that means "no condition", e.g. {"label": 10}.
      interval: (low, high) in logSNR: guidance acts where low < logsnr <= high, and the scale is 1
        elsewhere (Kynkaanniemi et al. 2024 state theirs in sigma: logsnr = -2 log sigma).
      rescale: 0 to 1, how far the guided x0 gets back the standard deviation of the conditional
        one, per sample (Lin et al. 2023, section 3.4). Needs the denoiser's schedule.

    Raises:
      UserError: an empty interval, a rescale outside [0, 1], or no schedule where one is needed.

    >>> denoise = guidance.cfg(denoise, scale=2.0, null={"label": 10})
    """
    denoise = as_denoiser(denoise)
    if interval is not None and is_concrete(interval) and not interval[0] < interval[1]:
        raise UserError(
            f"cfg: interval={interval} is empty; give (low, high) in logSNR, low < high."
        )
    if isinstance(rescale, int | float) and not 0 <= rescale <= 1:
        raise UserError(f"cfg: rescale={rescale} given; it lies in [0, 1].")
    if interval is not None or rescale is not None:
        schedule_of(denoise, where="cfg")
    if isinstance(scale, int):  # 2 and 2.5 are one program
        scale = float(scale)
    return CFG(denoise, scale, dict(null), interval, rescale)


def _rescale(guided: Array, conditional: Array, share: Array | float) -> Array:
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(conditional, axes, keepdims=True) / jnp.std(guided, axes, keepdims=True)
    return guided * (1.0 + expand(share, guided) * (ratio - 1.0))
