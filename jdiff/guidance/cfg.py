"""Classifier-free guidance (Ho and Salimans 2022, 2207.12598), with interval and rescale."""

from typing import Any

from jdiff.conditioning import with_null
from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.guidance.base import Extrapolation, Pair, call_together
from jdiff.guidance.rescale import rescale as rescaled
from jdiff.guidance.scales import PerSample, as_scale, hide, read
from jdiff.guidance.scales import interval as within
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, struct


@struct
class CFG(Extrapolation):
    """The guided denoiser that `cfg` makes. Leaves: denoiser, scale, null."""

    denoiser: Any
    scale: Any
    null: PyTree

    def alone(self, x: PyTree, t: Array, cond: PyTree) -> Prediction:
        """The prediction under the condition given."""
        return self.denoiser(x, t, hide(dict(cond or {}), self.scale, *self.null.values()))

    def pair(self, x: PyTree, t: Array, cond: PyTree) -> Pair:
        """One joint call: the null condition and the condition given."""
        cond = dict(cond or {})
        w = read(self.scale, self.schedule, t, cond)
        shown = hide(cond, self.scale, *self.null.values())
        good, bad = call_together(self.denoiser, x, t, [shown, replaced(shown, self.null, cond)])
        return Pair(bad, good, w)


def cfg(
    denoise: Any, scale: Any, null: dict[str, PyTree], *,
    interval: tuple[Any, Any] | None = None, rescale: Array | float | None = None,
) -> Extrapolation:  # fmt: skip
    """Classifier-free guidance: null + scale (conditional - null).

    scale = 1 is the conditional model, 0 the unconditional one; Ho and Salimans' w is scale - 1.

    Args:
      denoise: a denoiser whose `cond` holds the entries of `null`.
      scale: a number, `[B]`, `per_sample("scale")` to read `cond["scale"]`, or one of
        `guidance.scales`.
      null: the value of each guided entry that means "no condition", e.g. {"label": 10}; a negative
        prompt in its place pushes away from that. `per_sample("negative")` reads
        `cond["negative"]`, one value for each sample.
      interval: (low, high) in logSNR: guidance acts where low < logsnr <= high; elsewhere the
        scale is 1 and the null is not computed. Short for `scales.interval(scale, low, high)`.
      rescale: 0 to 1, how far the guided x0 gets back the standard deviation of the conditional
        one; short for `guidance.rescale(cfg(...), rescale)`.

    Raises:
      UserError: an empty interval, a rescale outside [0, 1], no schedule where one is needed; at
        the call, an entry that cond does not have.

    >>> denoise = guidance.cfg(denoise, scale=2.0, null={"label": 10})
    """
    denoise, scale = as_denoiser(denoise), as_scale(scale)
    if interval is not None or rescale is not None:
        schedule_of(denoise, where="cfg")
    if interval is not None:
        scale = within(scale, *interval)
    guided = CFG(denoise, scale, dict(null))
    return guided if rescale is None else rescaled(guided, rescale)


def replaced(
    shown: dict[str, PyTree], values: dict[str, PyTree], cond: dict[str, PyTree]
) -> dict[str, PyTree]:
    """`shown` with `values` in place; those that are `per_sample` are read from `cond`."""
    read_from = lambda v: v.at(None, None, cond) if isinstance(v, PerSample) else v
    return with_null(shown, {name: read_from(value) for name, value in values.items()})
