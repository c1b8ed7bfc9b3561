"""Guidance scales that depend on the noise level or on the sample, wherever a `scale` is taken.

A scale is a number, a `[B]` array, a function (schedule, t) -> `[B]`, or a struct made here. The
convention is that of all guidance: 1 is the conditional model, without guidance. Papers whose w
starts at 0 mean ours minus 1.

Ramps run over the progress u, 0 at pure noise and 1 at the data, on one of two clocks:

    "angle"  u = 1 - (2 / pi) atan(sigma / alpha): a function of logSNR alone, so that networks on
             different schedules get the same scales; the own time of the cosine schedule, reversed
    "time"   u = (t_max - t) / (t_max - t_data): the schedule's own time, the papers' 1 - t / T

Wang et al. 2024 (2404.13040) compare ramps: rising ones beat constants; the linear ramp is also
that of MUSE (Chang et al. 2023). Their linear 2 (1 - t / T) w is `linear(1, 1 + 2 w)` here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.pytree import Array, PyTree, is_concrete, static, struct
from jdiff.schedules import Schedule, first
from jdiff.schedules.base import finite_data


class Scale:
    """A scale that is looked up at each call."""

    #: The entries of `cond` that it reads, which the network is not shown.
    entries: tuple[str, ...] = ()

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """The scale at times t `[B]`: `[B]`."""
        raise NotImplementedError  # abstract


@struct
class PerSample(Scale):
    """Names the entry of `cond` that holds a value for each sample."""

    entry: str = static()

    @property
    def entries(self) -> tuple[str, ...]:
        """The entry."""
        return (self.entry,)

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> PyTree:
        """cond[entry]."""
        return cond[choose("per_sample: entry of cond", self.entry, cond)]


@struct
class Function(Scale):
    """A plain function of (schedule, t)."""

    fn: Callable[..., Array] = static()

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """Calls the function."""
        return self.fn(schedule, t)


@struct
class Interval(Scale):
    """Another scale where low < logsnr <= high, and 1 elsewhere."""

    scale: Any
    low: Array | float
    high: Array | float

    @property
    def entries(self) -> tuple[str, ...]:
        """Those of the scale inside."""
        return getattr(self.scale, "entries", ())

    def inside(self, schedule: PyTree, t: Array) -> Array:
        """Whether times t `[B]` are in the interval: bool `[B]`."""
        logsnr = first(schedule).logsnr(t)
        return (self.low < logsnr) & (logsnr <= self.high)

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """The scale inside, or 1."""
        inside = self.inside(schedule, t)
        return jnp.where(inside, _value(self.scale, schedule, t, cond), 1.0)


@struct
class PiecewiseLinear(Scale):
    """Scales at given logSNRs, lines between them, constant outside."""

    logsnrs: Array
    scales: Array

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """Interpolates in logSNR."""
        knots = jnp.asarray(self.logsnrs)
        logsnr = jnp.clip(first(schedule).logsnr(t), knots[0], knots[-1])
        return jnp.interp(logsnr, knots, jnp.asarray(self.scales))


@struct
class Ramp(Scale):
    """start + (end - start) f(u^power) over the progress u, f the identity or half a cosine."""

    start: Array | float
    end: Array | float
    power: Array | float
    shape: str = static("linear")
    clock: str = static("angle")

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """The ramp at t."""
        u = progress(first(schedule), t, self.clock) ** self.power
        f = u if self.shape == "linear" else 0.5 * (1.0 - jnp.cos(math.pi * u))
        return self.start + (self.end - self.start) * f


@struct
class Beta(Scale):
    """1 + (scale - 1) times the density of the beta distribution at the progress u."""

    scale: Array | float
    a: Array | float
    b: Array | float
    clock: str = static("angle")

    def at(self, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array:
        """The curve at t."""
        u = progress(first(schedule), t, self.clock)
        density = jnp.exp(jax.scipy.stats.beta.logpdf(u, self.a, self.b))
        return 1.0 + (self.scale - 1.0) * density


def progress(schedule: Schedule, t: Array, clock: str = "angle") -> Array:
    """How far from pure noise (0) to the data (1); see the module's docstring for the clocks.

    Raises:
      UserError: the clock "time" on a schedule whose data is not at a finite t.
    """
    if clock == "angle":
        u = 1.0 - jnp.arctan(schedule.sigma_ratio(t)) * (2.0 / math.pi)
    else:
        finite_data("guidance scale with clock='time'", schedule)
        u = (schedule.t_max - t) / (schedule.t_max - schedule.t_data)
    return jnp.clip(u, 0.0, 1.0)  # rounding must not leave the domain of u^power


def per_sample(entry: str = "scale") -> PerSample:
    """A value read from `cond[entry]` `[B]`, so that it is chunked with the samples.

    The entry is not shown to the network. A scale, or a null or negative condition.
    """
    return PerSample(entry)


def interval(scale: Any, low: Array | float, high: Array | float) -> Interval:
    """`scale` where low < logsnr <= high and 1 elsewhere (Kynkaanniemi et al. 2024, 2404.07724).

    Their interval is in sigma: logsnr = -2 log sigma, so [sigma_lo, sigma_hi) is
    low = -2 log sigma_hi, high = -2 log sigma_lo.

    Raises:
      UserError: the interval is empty.
    """
    if is_concrete((low, high)) and not low < high:
        raise UserError(
            f"interval=({low}, {high}) is empty; give (low, high) in logSNR, low < high."
        )
    return Interval(as_scale(scale), low, high)


def piecewise_linear(logsnrs: Any, scales: Any) -> PiecewiseLinear:
    """Scales `[n]` at rising logSNRs `[n]`, linear between them and constant outside.

    Raises:
      UserError: fewer than two knots, logSNRs that do not rise, or different lengths.
    """
    logsnrs, scales = jnp.asarray(logsnrs, float), jnp.asarray(scales, float)
    if logsnrs.ndim != 1 or logsnrs.shape != scales.shape or len(logsnrs) < 2:
        raise UserError(
            f"piecewise_linear: logsnrs {logsnrs.shape} and scales {scales.shape} given; two lists "
            "of one length, two knots or more, are needed."
        )
    if is_concrete(logsnrs) and not bool(jnp.all(jnp.diff(logsnrs) > 0)):
        raise UserError(f"piecewise_linear: logsnrs={logsnrs.tolist()} must rise.")
    return PiecewiseLinear(logsnrs, scales)


def linear(start: Array | float, end: Array | float, clock: str = "angle") -> Ramp:
    """start + (end - start) u: from `start` at pure noise to `end` at the data."""
    return _ramp("linear", start, end, 1.0, "linear", clock)


def power(
    start: Array | float, end: Array | float, exponent: Array | float, clock: str = "angle"
) -> Ramp:
    """start + (end - start) u^exponent.

    Raises:
      UserError: the exponent is not positive, or an unknown clock.
    """
    return _ramp("power", start, end, exponent, "linear", clock)


def cosine(
    start: Array | float, end: Array | float, exponent: Array | float = 1.0, clock: str = "angle"
) -> Ramp:
    """start + (end - start) (1 - cos(pi u^exponent)) / 2: the power-cosine of MDT (2303.14389).

    Raises:
      UserError: the exponent is not positive, or an unknown clock.
    """
    return _ramp("cosine", start, end, exponent, "cosine", clock)


def beta(
    scale: Array | float, a: Array | float = 2.0, b: Array | float = 2.0, clock: str = "angle"
) -> Beta:
    """1 + (scale - 1) Beta(u; a, b): no guidance at either end, `scale` on average over u.

    The curve of beta-CFG (Malarz et al. 2025, 2502.10574), without its normalisation of the
    difference.

    Raises:
      UserError: a or b is below 1, where the density has no bound, or an unknown clock.
    """
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, int | float) and not value >= 1:
            raise UserError(f"beta: {name}={value} given; it is at least 1.")
    choose("beta: clock", clock, ("angle", "time"))
    return Beta(as_scale(scale), a, b, clock)


def as_scale(scale: Any) -> Any:
    """A scale as a pytree: a whole number is a float (2 and 2.5 are one program), a plain function
    is wrapped."""
    if isinstance(scale, int):
        return float(scale)
    if callable(scale) and jax.tree_util.all_leaves([scale]):
        return Function(scale)
    return scale


def read(scale: Any, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array | float:
    """The scale's value at t `[B]`: a number or `[B]`.

    Raises:
      UserError: an array of another length than the batch.
    """
    w = _value(scale, schedule, t, cond)
    if jnp.ndim(w) and jnp.shape(w) != jnp.shape(t):
        raise UserError(
            f"scale of shape {jnp.shape(w)} for a batch of {len(t)}: give a number, [B], or "
            'per_sample("scale") with cond["scale"], which follows its samples through chunks and '
            "through guidance around this one."
        )
    return w


def acts(scale: Any, schedule: PyTree, t: Array) -> Array | None:
    """Whether a scale may be other than 1 at any of the times t `[B]`; None where its value alone
    can tell."""
    return scale.inside(schedule, t).any() if isinstance(scale, Interval) else None


def hide(cond: dict[str, PyTree], *scales: Any) -> dict[str, PyTree]:
    """`cond` without the entries that these scales (or conditions) read."""
    hidden = {name for scale in scales for name in getattr(scale, "entries", ())}
    return {name: value for name, value in cond.items() if name not in hidden}


def _value(scale: Any, schedule: PyTree, t: Array, cond: dict[str, PyTree]) -> Array | float:
    return scale.at(schedule, t, cond) if isinstance(scale, Scale) else scale


def _ramp(
    where: str, start: Array | float, end: Array | float, exponent: Array | float, shape: str,
    clock: str,
) -> Ramp:  # fmt: skip
    if isinstance(exponent, int | float) and not exponent > 0:
        raise UserError(f"{where}: exponent={exponent} given; it is positive.")
    choose(f"{where}: clock", clock, ("angle", "time"))
    return Ramp(as_scale(start), as_scale(end), as_scale(exponent), shape, clock)
