"""Distributions of the training time: (key, n, schedule) -> t `[n]`, as frozen pytrees of numbers.

Each draws n times in the schedule's own units, and says their `density(schedule, t)`, with which
`weightings.importance` makes any distribution estimate the same integral without bias. Any function
of the same three arguments is a distribution too, but for its density.

Laws on the unit interval (`uniform`, `logit_normal`, `mode`, `cosmap`, `shifted`) are laid over the
schedule's [t_min, t_max]; on a discrete table over its steps 1..T. Laws of the logSNR (`lognormal`,
`logsnr_*`) reach times through `schedule.time`, are not cut to the domain, and do not depend on how
the schedule runs in t. `stratified` spreads the n uniforms evenly over their range with one common
shift (Kingma et al. 2021, appendix I.1): the same marginal, less variance in the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from jdiff.errors import UserError, positive
from jdiff.pytree import Array, is_concrete, static, struct
from jdiff.schedules import Schedule, shift_time


def unit(key: Array, n: int, stratified: bool) -> Array:
    """n uniforms on [0, 1), independent or stratified."""
    if not stratified:
        return jax.random.uniform(key, (n,))
    return (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0


class Unit:
    """A law on the unit interval, laid over the schedule's domain. A subclass defines three."""

    stratified: bool

    def quantile(self, u: Array) -> Array:
        """The inverse of `cdf`."""
        raise NotImplementedError  # abstract

    def cdf(self, x: Array) -> Array:
        """P(X <= x), x in [0, 1]."""
        raise NotImplementedError  # abstract

    def pdf(self, x: Array) -> Array:
        """The derivative of `cdf`."""
        raise NotImplementedError  # abstract

    def __call__(self, key: Array, n: int, schedule: Schedule) -> Array:
        """t `[n]`."""
        # Off the ends: a float32 uniform is 0 once in 2^23 draws, and a weight at sigma = 0 is NaN.
        x = _inside(self.quantile(_inside(unit(key, n, self.stratified))))
        if schedule.T is not None:
            return 1.0 + jnp.minimum(jnp.floor(x * schedule.T), schedule.T - 1.0)
        return schedule.t_min + x * (schedule.t_max - schedule.t_min)

    def density(self, schedule: Schedule, t: Array) -> Array:
        """p(t), 0 outside the domain; on a discrete table, the probability of step t."""
        if schedule.T is not None:
            return self.cdf(t / schedule.T) - self.cdf((t - 1.0) / schedule.T)
        length = schedule.t_max - schedule.t_min
        x = (t - schedule.t_min) / length
        return jnp.where((x >= 0) & (x <= 1), self.pdf(_inside(x)) / length, 0.0)


@struct
class Uniform(Unit):
    """t uniform on the schedule's [t_min, t_max]; on a discrete table, over its steps 1..T."""

    stratified: bool = static(False)

    def quantile(self, u: Array) -> Array:
        """u."""
        return u

    def cdf(self, x: Array) -> Array:
        """x."""
        return x

    def pdf(self, x: Array) -> Array:
        """1."""
        return jnp.ones_like(x)


@struct
class LogitNormal(Unit):
    """logit(t) normal (Esser et al. 2024, SD3, equation 19)."""

    mean: Array | float = 0.0
    std: Array | float = 1.0
    stratified: bool = static(False)

    def quantile(self, u: Array) -> Array:
        """The logistic of a normal quantile."""
        return jax.nn.sigmoid(self.mean + self.std * ndtri(u))

    def cdf(self, x: Array) -> Array:
        """The normal's, at logit(x)."""
        return ndtr((jax.scipy.special.logit(x) - self.mean) / self.std)

    def pdf(self, x: Array) -> Array:
        """Equation 19."""
        z = (jax.scipy.special.logit(x) - self.mean) / self.std
        return jnp.exp(-0.5 * z**2) / (self.std * jnp.sqrt(2.0 * jnp.pi) * x * (1.0 - x))


@struct
class Mode(Unit):
    """SD3's heavy-tailed law (Esser et al. 2024, equation 20), with u as their 1 - u."""

    scale: Array | float = 1.29
    stratified: bool = static(False)

    def quantile(self, u: Array) -> Array:
        """f_mode(1 - u; s) = u + s (u - sin^2(pi u / 2)), which rises with u."""
        return u + self.scale * (u - jnp.square(jnp.sin(0.5 * jnp.pi * u)))

    def cdf(self, x: Array) -> Array:
        """The root of `quantile`, by bisection to the last digit."""

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            below = self.quantile(middle) < x
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        digits = 54 if x.dtype == jnp.float64 else 26
        low, high = jax.lax.fori_loop(0, digits, halve, (jnp.zeros_like(x), jnp.ones_like(x)))
        return 0.5 * (low + high)

    def pdf(self, x: Array) -> Array:
        """1 / f', at the root."""
        u = self.cdf(x)
        return 1.0 / (1.0 + self.scale * (1.0 - 0.5 * jnp.pi * jnp.sin(jnp.pi * u)))


@struct
class CosMap(Unit):
    """The law that gives a straight path the cosine schedule's logSNR (SD3, equation 21)."""

    stratified: bool = static(False)

    def quantile(self, u: Array) -> Array:
        """1 - 1 / (tan(pi u / 2) + 1), without the tangent's pole."""
        sine, cosine = jnp.sin(0.5 * jnp.pi * u), jnp.sin(0.5 * jnp.pi * (1.0 - u))
        return sine / (sine + cosine)

    def cdf(self, x: Array) -> Array:
        """(2 / pi) atan(x / (1 - x))."""
        return (2.0 / jnp.pi) * jnp.arctan2(x, 1.0 - x)

    def pdf(self, x: Array) -> Array:
        """2 / (pi - 2 pi x + 2 pi x^2)."""
        return 2.0 / (jnp.pi * (1.0 - 2.0 * x * (1.0 - x)))


@struct
class Shifted(Unit):
    """Another unit law, its times moved towards noise: SD3's resolution shift, equation 23."""

    of: Unit
    shift: Array | float

    @property
    def stratified(self) -> bool:
        """As the law that is shifted."""
        return self.of.stratified

    def quantile(self, u: Array) -> Array:
        """The law's, shifted."""
        return shift_time(self.of.quantile(u), self.shift)

    def cdf(self, x: Array) -> Array:
        """The law's, where x came from."""
        return self.of.cdf(shift_time(x, 1.0 / self.shift))

    def pdf(self, x: Array) -> Array:
        """The law's, times the derivative of the inverse shift."""
        back = 1.0 / self.shift
        slope = back / jnp.square(1.0 + (back - 1.0) * x)
        return self.of.pdf(shift_time(x, back)) * slope


@struct
class ByLogSNR:
    """A law of the logSNR, brought to times by the schedule. Not cut to the schedule's domain."""

    law: Any
    stratified: bool = static(False)

    def __call__(self, key: Array, n: int, schedule: Schedule) -> Array:
        """t `[n]`, rising with the uniform that it is drawn by."""
        return schedule.time(self.law.quantile(1.0 - _inside(unit(key, n, self.stratified))))

    def density(self, schedule: Schedule, t: Array) -> Array:
        """p(t) = p(logSNR) |d logSNR / dt|."""
        logsnr, slope = jax.jvp(schedule.logsnr, (t,), (jnp.ones_like(t),))
        return self.law.pdf(logsnr) * -slope


@struct
class Normal:
    """A normal law of the logSNR."""

    mean: Array | float
    std: Array | float

    def quantile(self, u: Array) -> Array:
        """The logSNR below which a share u lies."""
        return self.mean + self.std * ndtri(u)

    def pdf(self, logsnr: Array) -> Array:
        """The density."""
        z = (logsnr - self.mean) / self.std
        return jnp.exp(-0.5 * z**2) / (self.std * jnp.sqrt(2.0 * jnp.pi))


@struct
class Laplace:
    """A Laplace law of the logSNR."""

    mean: Array | float
    scale: Array | float

    def quantile(self, u: Array) -> Array:
        """The logSNR below which a share u lies."""
        tail = jnp.log(2.0 * jnp.minimum(u, 1.0 - u))
        return self.mean + self.scale * jnp.where(u < 0.5, tail, -tail)

    def pdf(self, logsnr: Array) -> Array:
        """The density."""
        return jnp.exp(-jnp.abs(logsnr - self.mean) / self.scale) / (2.0 * self.scale)


@struct
class Table:
    """A law of the logSNR that is constant between the points of a grid."""

    logsnr: Array  # [K], rising
    cdf: Array  # [K], from 0 to 1

    def quantile(self, u: Array) -> Array:
        """The logSNR below which a share u lies."""
        return jnp.interp(u, self.cdf, self.logsnr)

    def pdf(self, logsnr: Array) -> Array:
        """The density, 0 off the grid."""
        i = jnp.clip(jnp.searchsorted(self.logsnr, logsnr) - 1, 0, len(self.logsnr) - 2)
        height = jnp.diff(self.cdf)[i] / jnp.diff(self.logsnr)[i]
        inside = (logsnr >= self.logsnr[0]) & (logsnr <= self.logsnr[-1])
        return jnp.where(inside, height, 0.0)


def uniform(stratified: bool = False) -> Uniform:
    """Uniform in t."""
    return Uniform(stratified)


def lognormal(mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> ByLogSNR:
    """log(sigma / alpha) ~ N(mean, std^2); EDM's P_mean and P_std (Karras et al. 2022, table 1)."""
    positive("lognormal", std=std)
    return ByLogSNR(Normal(-2.0 * mean, 2.0 * std), stratified)


def logit_normal(mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> LogitNormal:
    """logit(t) ~ N(mean, std^2); SD3's rf/lognorm(mean, std)."""
    positive("logit_normal", std=std)
    return LogitNormal(mean, std, stratified)


def mode(scale: float = 1.29, stratified: bool = False) -> Mode:
    """SD3's rf/mode(scale): more weight to the middle above 0, to the ends below, 0 is uniform.

    Raises:
      UserError: a scale outside [-1, 2 / (pi - 2)], where equation 20 is not monotone.
    """
    if is_concrete(scale) and not -1.0 <= scale <= 2.0 / (jnp.pi - 2.0):
        raise UserError(f"mode: scale={scale} given; allowed are -1 to 2 / (pi - 2) = 1.7519.")
    return Mode(scale, stratified)


def cosmap(stratified: bool = False) -> CosMap:
    """SD3's rf/cosmap: a rectified flow trained at the logSNRs of the cosine schedule."""
    return CosMap(stratified)


def shifted(distribution: Unit | None = None, shift: float = 3.0) -> Shifted:
    """Times of a unit law (uniform unless given) as t -> shift t / (1 + (shift - 1) t).

    The shift of training alone: a schedule that is itself shifted, or a shifted sampling grid, is
    another choice, and with both the shift counts twice. SD3: sqrt(pixels / pixels of the
    reference), 3 at 1024 x 1024; FLUX: exp(mu), mu from the number of tokens.

    Raises:
      UserError: a shift that is not positive, or a law of the logSNR, which shifts by its mean.
    """
    distribution = uniform() if distribution is None else distribution
    if not isinstance(distribution, Unit):
        raise UserError(
            f"shifted: a law on the unit interval is needed, given {type(distribution).__name__}; "
            "shift a law of the logSNR by -2 log(shift) in its mean."
        )
    positive("shifted", shift=shift)
    return Shifted(distribution, shift)


def by_logsnr(law: Any, stratified: bool = False) -> ByLogSNR:
    """Times whose logSNR follows a law with `quantile(u)` and `pdf(logsnr)`."""
    return ByLogSNR(law, stratified)


def logsnr_normal(mean: float = 0.0, std: float = 2.4, stratified: bool = False) -> ByLogSNR:
    """logSNR ~ N(mean, std^2). `lognormal` is this in EDM's numbers: -2 P_mean and 2 P_std."""
    positive("logsnr_normal", std=std)
    return ByLogSNR(Normal(mean, std), stratified)


def logsnr_laplace(mean: float = 0.0, scale: float = 0.5, stratified: bool = False) -> ByLogSNR:
    """logSNR ~ Laplace(mean, scale) (Hang et al. 2024, 2407.03297)."""
    positive("logsnr_laplace", scale=scale)
    return ByLogSNR(Laplace(mean, scale), stratified)


def logsnr_uniform(low: float, high: float, stratified: bool = False) -> ByLogSNR:
    """logSNR uniform on [low, high]: what VDM's linear schedule draws (Kingma et al. 2021)."""
    return logsnr_table((low, high), (1.0, 1.0), stratified)


def logsnr_table(logsnr: Any, density: Any, stratified: bool = False) -> ByLogSNR:
    """Any density of the logSNR: its values (up to a factor) on a rising grid, both `[K]`.

    Between two points the density is their mean; draws and `density` agree exactly.

    Raises:
      UserError: a grid that does not rise, or values that are negative or all 0.
    """
    float_ = jnp.result_type(float)
    logsnr, density = jnp.asarray(logsnr, float_), jnp.asarray(density, float_)
    if logsnr.shape != density.shape or logsnr.ndim != 1 or len(logsnr) < 2:
        raise UserError(
            f"logsnr_table: logsnr {logsnr.shape} and density {density.shape} given; both are [K], "
            "K at least 2."
        )
    share = 0.5 * (density[1:] + density[:-1]) * jnp.diff(logsnr)
    if is_concrete((logsnr, density)):
        if not bool((jnp.diff(logsnr) > 0).all()):
            raise UserError(f"logsnr_table: logsnr must rise, given {logsnr}.")
        if not (bool((density >= 0).all()) and float(share.sum()) > 0):
            raise UserError("logsnr_table: density has negative values, or none above 0.")
    cdf = jnp.concatenate([jnp.zeros(1, float_), jnp.cumsum(share)]) / share.sum()
    return ByLogSNR(Table(logsnr, cdf), stratified)


#: Distributions by name, as configs give them.
BY_NAME = {
    "uniform": uniform, "lognormal": lognormal, "logit_normal": logit_normal, "mode": mode,
    "cosmap": cosmap, "shifted": shifted, "logsnr_normal": logsnr_normal,
    "logsnr_laplace": logsnr_laplace, "logsnr_uniform": logsnr_uniform,
    "logsnr_table": logsnr_table,
}  # fmt: skip


def _inside(u: Array) -> Array:
    """u kept off 0 and 1, where the normal quantile is infinite (float32: 5.3 deviations)."""
    return jnp.clip(u, 2.0**-24, 1.0 - 2.0**-24)
