"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, as frozen pytrees of numbers.

Conventions, the same for every schedule:

* t grows with noise. `t_data` (0 unless said otherwise) is the data itself: alpha = 1, sigma = 0,
  exactly. Papers whose time runs the other way are mapped here: their t is our 1 - t.
* `[t_min, t_max]` is the domain on which a network is trained and evaluated; solvers step from
  t_max down to t_data and never evaluate a denoiser at t_data.
* logsnr = 2 log(alpha / sigma) falls strictly with t, and `time` is its inverse.
* Numbers (beta_max, sigma_min, ...) are leaves: they can be traced, swept by vmap or learned.

A pytree prefix of schedules gives each part of x its own; `schedule_map` is how the rest of the
ground floor applies them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, is_concrete, prefix_map, static, struct


class Schedule:
    """What a schedule offers. A subclass defines `alpha`, `sigma`, `logsnr`, `time` and its domain.

    All functions take and return arrays of any shape; t is in the schedule's own units.
    """

    t_min: float
    t_max: float
    t_data: float = 0.0

    def alpha(self, t: Array) -> Array:
        """The signal level, 1 at the data."""
        return jnp.sqrt(jax.nn.sigmoid(self.logsnr(t)))

    def sigma(self, t: Array) -> Array:
        """The noise level, 0 at the data."""
        return jnp.sqrt(jax.nn.sigmoid(-self.logsnr(t)))

    def logsnr(self, t: Array) -> Array:
        """2 log(alpha / sigma): strictly falling, +inf at the data."""
        raise NotImplementedError  # abstract

    def time(self, logsnr: Array) -> Array:
        """The inverse of `logsnr`."""
        raise NotImplementedError  # abstract

    def sigma_ratio(self, t: Array) -> Array:
        """sigma / alpha: the noise level in EDM's units, those of the karras grid and of churn."""
        return jnp.exp(-0.5 * self.logsnr(t))

    def rates(self, t: Array) -> tuple[Array, Array]:
        """(d alpha / dt, d sigma / dt), the coefficients of the velocity dx/dt on (x0, eps)."""
        t = jnp.asarray(t, _float(t))
        one = jnp.ones_like(t)
        return jax.jvp(self.alpha, (t,), (one,))[1], jax.jvp(self.sigma, (t,), (one,))[1]

    def drift(self, t: Array) -> Array:
        """f(t) = d log alpha / dt of the forward SDE dx = f x dt + g dw (Song et al. 2021)."""
        return self.rates(t)[0] / self.alpha(t)

    def diffusion(self, t: Array) -> Array:
        """g(t) of the forward SDE: g^2 = d sigma^2 / dt - 2 f sigma^2."""
        rate = self.rates(t)[1]
        sigma = self.sigma(t)
        return jnp.sqrt(jnp.maximum(2.0 * sigma * (rate - self.drift(t) * sigma), 0.0))


@struct
class EDM(Schedule):
    """alpha = 1, sigma = t: the schedule of Karras et al. 2022 (table 1, last column)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def t_min(self) -> float:
        """The smallest sigma a network sees."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """The largest sigma a network sees."""
        return self.sigma_max

    def alpha(self, t: Array) -> Array:
        """1."""
        return jnp.ones_like(jnp.asarray(t, _float(t)))

    def sigma(self, t: Array) -> Array:
        """t."""
        return jnp.asarray(t, _float(t))

    def logsnr(self, t: Array) -> Array:
        """-2 log t."""
        return -2.0 * jnp.log(self.sigma(t))

    def time(self, logsnr: Array) -> Array:
        """exp(-logsnr / 2)."""
        return jnp.exp(-0.5 * jnp.asarray(logsnr, _float(logsnr)))


@struct
class VPLinear(Schedule):
    """beta(t) = beta_min + t (beta_max - beta_min) on [0, 1] (Song et al. 2021, equation 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def _integral(self, t: Array) -> Array:
        t = jnp.asarray(t, _float(t))
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def alpha(self, t: Array) -> Array:
        """exp(-B / 2), B the integral of beta."""
        return jnp.exp(-0.5 * self._integral(t))

    def sigma(self, t: Array) -> Array:
        """sqrt(1 - exp(-B)), through expm1 so that small t keep their digits."""
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def logsnr(self, t: Array) -> Array:
        """-log(exp(B) - 1)."""
        return -jnp.log(jnp.expm1(self._integral(t)))

    def time(self, logsnr: Array) -> Array:
        """The root of the quadratic B(t) = log(1 + exp(-logsnr)), in its stable form."""
        integral = jax.nn.softplus(-jnp.asarray(logsnr, _float(logsnr)))
        slope = self.beta_max - self.beta_min
        return (
            2.0 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral))
        )


@struct
class Cosine(Schedule):
    """alpha / sigma = shift cot(pi t / 2) (Nichol and Dhariwal 2021; shift: Hoogeboom et al. 2023).

    The logSNR limits bound the domain: t uniform on [t_min, t_max] is Salimans and Ho's (2022)
    truncated cosine, while t = 0 stays the data itself.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    shift: float = 1.0

    @property
    def t_min(self) -> Array:
        """The time at logsnr_max."""
        return self.time(self.logsnr_max)

    @property
    def t_max(self) -> Array:
        """The time at logsnr_min."""
        return self.time(self.logsnr_min)

    def logsnr(self, t: Array) -> Array:
        """-2 log tan(pi t / 2) + 2 log shift."""
        t = jnp.asarray(t, _float(t))
        # The cosine as a sine of 1 - t: float32's tan has 3 digits left at t_max, and NaN at 1.
        sine, cosine = jnp.sin(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * (1.0 - t))
        return 2.0 * (jnp.log(cosine) - jnp.log(sine) + jnp.log(self.shift))

    def time(self, logsnr: Array) -> Array:
        """(2 / pi) atan(shift exp(-logsnr / 2))."""
        logsnr = jnp.asarray(logsnr, _float(logsnr))
        return (2.0 / jnp.pi) * jnp.arctan(self.shift * jnp.exp(-0.5 * logsnr))


@struct
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t on [0, 1]: straight paths (Liu et al. 2022; Lipman et al. 2023).

    t = 1 is noise, as in SD3 and MeanFlow; Lipman's, SiT's and JiT's t is our 1 - t.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Array) -> Array:
        """1 - t."""
        return 1.0 - jnp.asarray(t, _float(t))

    def sigma(self, t: Array) -> Array:
        """t."""
        return jnp.asarray(t, _float(t))

    def logsnr(self, t: Array) -> Array:
        """2 log((1 - t) / t)."""
        t = self.sigma(t)
        return 2.0 * (jnp.log1p(-t) - jnp.log(t))

    def time(self, logsnr: Array) -> Array:
        """1 / (1 + exp(logsnr / 2))."""
        return jax.nn.sigmoid(-0.5 * jnp.asarray(logsnr, _float(logsnr)))


@struct
class Discrete(Schedule):
    """A table of T noise levels: exact at t = 1..T, continuous between, the data at t = 0.

    t counts noising steps as in Ho et al. 2020: their code's (and diffusers') index is t - 1, which
    is what the network of such a model takes (`time="step"` in `predictions`). Between integers the
    logSNR is interpolated linearly, as k-diffusion does; below t = 1, sigma / alpha falls linearly
    to 0.
    """

    table: Array  # [T] the logSNR after 1..T steps
    T: int = static()

    @property
    def t_min(self) -> float:
        """One step of noise."""
        return 1.0

    @property
    def t_max(self) -> float:
        """All T steps."""
        return float(self.T)

    def logsnr(self, t: Array) -> Array:
        """The table at integer t, interpolated between."""
        t = jnp.asarray(t, _float(t))
        inside = jnp.interp(t, jnp.arange(1, self.T + 1, dtype=t.dtype), self.table)
        below = self.table[0] - 2.0 * jnp.log(jnp.minimum(t, 1.0))
        return jnp.where(t < 1.0, below, inside)

    def time(self, logsnr: Array) -> Array:
        """The inverse of the interpolation."""
        logsnr = jnp.asarray(logsnr, _float(logsnr))
        index = jnp.arange(1, self.T + 1, dtype=logsnr.dtype)
        inside = jnp.interp(-logsnr, -self.table, index)
        below = jnp.exp(0.5 * (self.table[0] - logsnr))
        return jnp.where(logsnr > self.table[0], below, inside)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """EDM's schedule, sigma(t) = t (Karras et al. 2022). Raises UserError for an empty range."""
    _ordered("edm", "sigma_min", sigma_min, "sigma_max", sigma_max)
    return EDM(sigma_min, sigma_max)


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> VPLinear:
    """The variance-preserving SDE with linear beta (Song et al. 2021). t in [t_min, 1].

    Raises:
      UserError: beta_min is not positive, or above beta_max.
    """
    if is_concrete((beta_min, beta_max)) and not 0 < beta_min <= beta_max:  # equal: constant beta
        raise UserError(
            f"vp_linear: beta_min={beta_min} and beta_max={beta_max} given; "
            "allowed are 0 < beta_min <= beta_max."
        )
    return VPLinear(beta_min, beta_max, t_min)


def cosine(logsnr_min: float = -20.0, logsnr_max: float = 20.0, shift: float = 1.0) -> Cosine:
    """The cosine schedule with logSNR limits and resolution shift (Hoogeboom et al. 2023).

    For d x d pixels trained with a network tuned at 64 x 64, shift = 64 / d.
    """
    _ordered("cosine", "logsnr_min", logsnr_min, "logsnr_max", logsnr_max)
    return Cosine(logsnr_min, logsnr_max, shift)


def rectified_flow() -> RectifiedFlow:
    """Straight paths between data (t = 0) and noise (t = 1)."""
    return RectifiedFlow()


def ddpm_linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Discrete:
    """The DDPM table: beta_t linear from beta_start to beta_end over T steps (Ho et al. 2020)."""
    if T < 2:
        raise UserError(f"ddpm_linear: T={T} given; a table needs at least 2 steps.")
    step = (beta_end - beta_start) / (T - 1)
    return from_betas([beta_start + i * step for i in range(T)])


def from_betas(betas: list[float]) -> Discrete:
    """A `Discrete` schedule from beta_1..beta_T; the products are taken in double precision."""
    log_abar, table = 0.0, []
    for i, beta in enumerate(betas):
        if not 0.0 < beta < 1.0:
            raise UserError(f"from_betas: betas[{i}]={beta} given; allowed are 0 < beta < 1.")
        log_abar += math.log1p(-beta)
        table.append(log_abar - math.log(-math.expm1(log_abar)))  # log(abar / (1 - abar))
    return Discrete(jnp.asarray(table), len(table))


#: Schedules by name, as configs give them.
BY_NAME = {
    "edm": edm, "vp_linear": vp_linear, "cosine": cosine, "ddpm_linear": ddpm_linear,
    "rectified_flow": rectified_flow,
}  # fmt: skip


def is_schedule(x: Any) -> bool:
    """Whether x is one schedule, the leaf of a prefix tree of schedules."""
    return isinstance(x, Schedule)


def schedule_map(fn: Callable[..., Any], schedule: PyTree, x: PyTree, *rest: PyTree) -> PyTree:
    """Maps `fn(schedule, x_leaf, *rest_leaves)` over x, each leaf with the schedule that serves it.

    `schedule` is one schedule or a pytree prefix of x with schedules as leaves.
    """
    return prefix_map(fn, schedule, is_schedule, x, *rest)


def first(schedule: PyTree) -> Schedule:
    """The schedule of the first leaf: what a grid or a time distribution refers to.

    Raises:
      UserError: there is no schedule in the tree.
    """
    found = [s for s in jax.tree.leaves(schedule, is_leaf=is_schedule) if is_schedule(s)]
    if not found:
        raise UserError(f"schedule: a Schedule (or a tree of them) is needed, given {schedule!r}.")
    return found[0]


def _float(t: Any) -> Any:
    """The dtype to compute t in: its own but never below float32; for a number, jax's default."""
    if not hasattr(t, "dtype"):
        return jnp.result_type(float)
    return jnp.promote_types(jnp.asarray(t).dtype, jnp.float32)  # asarray: numpy's float64 is ours


def _ordered(where: str, low_name: str, low: Any, high_name: str, high: Any) -> None:
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise UserError(f"{where}: {low_name}={low} must be below {high_name}={high}.")
