"""Variance-preserving schedules, alpha^2 + sigma^2 = 1, given by their logSNR or their alpha."""

import math

import jax
import jax.numpy as jnp

from jdiff.errors import positive
from jdiff.pytree import Array, struct
from jdiff.schedules.base import Schedule, lost, ordered, real


class Limited(Schedule):
    """A schedule whose domain is given by limits of its logSNR."""

    logsnr_min: float
    logsnr_max: float

    @property
    def t_min(self) -> Array:
        """The time at logsnr_max."""
        return self.time(self.logsnr_max)

    @property
    def t_max(self) -> Array:
        """The time at logsnr_min."""
        return self.time(self.logsnr_min)


@struct
class Cosine(Limited):
    """alpha / sigma = shift cot(pi t / 2) (Nichol and Dhariwal 2021; shift: Hoogeboom et al. 2023).

    The logSNR limits bound the domain: t uniform on [t_min, t_max] is Salimans and Ho's (2022)
    truncated cosine, while t = 0 stays the data itself.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    shift: float = 1.0

    def _legs(self, t: Array) -> tuple[Array, Array]:
        """alpha and sigma up to a common factor, which is 1 without a shift."""
        t = real(t)
        # The cosine as a sine of 1 - t: float32's cosine has 3 digits left at t_max.
        sine, cosine = jnp.sin(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * (1.0 - t))
        return self.shift * cosine, sine

    def alpha(self, t: Array) -> Array:
        """cos(pi t / 2), or shift times it over the common norm: its rate is finite at t = 1."""
        a, b = self._legs(t)
        return a / jnp.sqrt(a * a + b * b)

    def sigma(self, t: Array) -> Array:
        """sin(pi t / 2), or that over the common norm."""
        a, b = self._legs(t)
        return b / jnp.sqrt(a * a + b * b)

    def logsnr(self, t: Array) -> Array:
        """-2 log tan(pi t / 2) + 2 log shift."""
        a, b = self._legs(t)
        return 2.0 * (jnp.log(a) - jnp.log(b))

    def time(self, logsnr: Array) -> Array:
        """(2 / pi) atan(shift exp(-logsnr / 2))."""
        return (2.0 / jnp.pi) * jnp.arctan(self.shift * jnp.exp(-0.5 * real(logsnr)))

    def warp(self, t: Array, shift: Array) -> Array:
        """(2 / pi) atan(tan(pi t / 2) / shift), finite at t = 1."""
        a, b = self._legs(t)
        return (2.0 / jnp.pi) * jnp.arctan2(self.shift * b, shift * a)


@struct
class Sigmoid(Limited):
    """alpha^2 from 1 to 0 along a piece of a sigmoid (Jabri et al. 2022, RIN, appendix B).

    alpha^2 = (S(end / tau) - S(x)) / (S(end / tau) - S(start / tau)), x from start / tau to
    end / tau as t goes from 0 to 1, S the logistic function.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    @property
    def _half(self) -> Array:
        return 0.5 * (self.end - self.start) / self.tau

    @property
    def _offset(self) -> Array:
        """log cosh(start / 2 tau) - log cosh(end / 2 tau): 0 for a symmetric piece."""
        s, e = 0.5 * self.start / self.tau, 0.5 * self.end / self.tau
        return jnp.logaddexp(s, -s) - jnp.logaddexp(e, -e)

    def logsnr(self, t: Array) -> Array:
        """S(b) - S(a) as sinh((b - a) / 2) / (2 cosh(a / 2) cosh(b / 2)): nothing cancels."""
        t = real(t)
        log_sinh = lambda z: z + jnp.log(-jnp.expm1(-2.0 * z))  # up to log 2
        return log_sinh((1.0 - t) * self._half) - log_sinh(t * self._half) + self._offset

    def time(self, logsnr: Array) -> Array:
        """log(1 + (exp(2 d) - 1) / (R exp(d) + 1)) / (2 d), R the ratio of the two sinh."""
        d, log_r = self._half, real(logsnr) - self._offset
        return jnp.log1p(jnp.expm1(2.0 * d) / (jnp.exp(log_r + d) + 1.0)) / (2.0 * d)


@struct
class PowerVP(Schedule):
    """alpha = (1 - t)^n on [0, 1]."""

    n: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Array) -> Array:
        """(1 - t)^n."""
        return (1.0 - real(t)) ** self.n

    def sigma(self, t: Array) -> Array:
        """sqrt(1 - (1 - t)^(2 n))."""
        return jnp.sqrt(lost(t, 2.0 * self.n))

    def logsnr(self, t: Array) -> Array:
        """2 n log(1 - t) - log(1 - (1 - t)^(2 n))."""
        return 2.0 * self.n * jnp.log1p(-real(t)) - jnp.log(lost(t, 2.0 * self.n))

    def time(self, logsnr: Array) -> Array:
        """1 - sigmoid(logsnr)^(1 / 2 n)."""
        return -jnp.expm1(jax.nn.log_sigmoid(real(logsnr)) / (2.0 * self.n))

    def warp(self, t: Array, shift: Array) -> Array:
        """t + (1 - t) (1 - (1 + (1 / shift^2 - 1) sigma^2)^(-1 / 2 n)), smooth at t = 1."""
        t = real(t)
        gain = -jnp.log1p((shift**-2.0 - 1.0) * lost(t, 2.0 * self.n)) / (2.0 * self.n)
        return t - (1.0 - t) * jnp.expm1(gain)


@struct
class LinearLogSNR(Schedule):
    """logSNR linear in t, from logsnr_max at t = 0 to logsnr_min at t = 1; the data at t = -inf."""

    logsnr_min: float = -5.0
    logsnr_max: float = 13.3

    t_min, t_max, t_data = 0.0, 1.0, -math.inf

    def logsnr(self, t: Array) -> Array:
        """logsnr_max - t (logsnr_max - logsnr_min)."""
        return self.logsnr_max - real(t) * (self.logsnr_max - self.logsnr_min)

    def time(self, logsnr: Array) -> Array:
        """(logsnr_max - logsnr) / (logsnr_max - logsnr_min)."""
        return (self.logsnr_max - real(logsnr)) / (self.logsnr_max - self.logsnr_min)


def cosine(logsnr_min: float = -20.0, logsnr_max: float = 20.0, shift: float = 1.0) -> Cosine:
    """The cosine schedule with logSNR limits and resolution shift (Hoogeboom et al. 2023).

    For d x d pixels trained with a network tuned at 64 x 64, shift = 64 / d.

    Raises:
      UserError: logsnr_min is not below logsnr_max, or shift not positive.
    """
    ordered("cosine", "logsnr_min", logsnr_min, "logsnr_max", logsnr_max)
    positive("cosine", shift=shift)
    return Cosine(logsnr_min, logsnr_max, shift)


def gvp() -> Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) on all of [0, 1] (Albergo and Vanden-Eijnden).

    SiT's generalised VP interpolant (Ma et al. 2024, section 2.3), whose t is our 1 - t: the cosine
    schedule without limits, trigonometric flow.
    """
    return Cosine(-math.inf, math.inf)


def sigmoid(
    start: float = -3.0, end: float = 3.0, tau: float = 1.0,
    logsnr_min: float = -10.0, logsnr_max: float = 10.0,
) -> Sigmoid:  # fmt: skip
    """The sigmoid schedule (Jabri et al. 2022; Chen 2023, algorithm 1), with logSNR limits.

    Args:
      start, end: the piece of the sigmoid, before the division by tau.
      tau: its temperature: a larger one is closer to alpha^2 = 1 - t.
      logsnr_min, logsnr_max: near t = 1 the logSNR falls as log(1 - t), so that float32 times end
        not far below -14.

    Raises:
      UserError: start is not below end, or tau not positive.
    """
    ordered("sigmoid", "start", start, "end", end)
    positive("sigmoid", tau=tau)
    ordered("sigmoid", "logsnr_min", logsnr_min, "logsnr_max", logsnr_max)
    return Sigmoid(start, end, tau, logsnr_min, logsnr_max)


def linear_vp() -> PowerVP:
    """alpha = 1 - t, variance preserving (the linear VP path of the flow_matching library)."""
    return PowerVP(1.0)


def linear_gamma() -> PowerVP:
    """alpha^2 = 1 - t, variance preserving: gamma(t) = 1 - t of Chen 2023, section 3."""
    return PowerVP(0.5)


def linear_logsnr(logsnr_min: float = -5.0, logsnr_max: float = 13.3) -> LinearLogSNR:
    """logSNR linear in t, variance preserving: VDM's fixed schedule (Kingma et al. 2021).

    sigma never reaches 0 at a finite t: `t_data` is -inf, and grids end there.
    """
    ordered("linear_logsnr", "logsnr_min", logsnr_min, "logsnr_max", logsnr_max)
    return LinearLogSNR(logsnr_min, logsnr_max)
