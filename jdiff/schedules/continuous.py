"""Schedules in closed form, continuous in t."""

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, is_concrete, struct
from jdiff.schedules.base import Schedule, ordered, real


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
        return jnp.ones_like(real(t))

    def sigma(self, t: Array) -> Array:
        """t."""
        return real(t)

    def logsnr(self, t: Array) -> Array:
        """-2 log t."""
        return -2.0 * jnp.log(self.sigma(t))

    def time(self, logsnr: Array) -> Array:
        """exp(-logsnr / 2)."""
        return jnp.exp(-0.5 * real(logsnr))


@struct
class VPLinear(Schedule):
    """beta(t) = beta_min + t (beta_max - beta_min) on [0, 1] (Song et al. 2021, equation 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def _integral(self, t: Array) -> Array:
        t = real(t)
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
        integral = jax.nn.softplus(-real(logsnr))
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
        t = real(t)
        # The cosine as a sine of 1 - t: float32's tan has 3 digits left at t_max, and NaN at 1.
        sine, cosine = jnp.sin(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * (1.0 - t))
        return 2.0 * (jnp.log(cosine) - jnp.log(sine) + jnp.log(self.shift))

    def time(self, logsnr: Array) -> Array:
        """(2 / pi) atan(shift exp(-logsnr / 2))."""
        logsnr = real(logsnr)
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
        return 1.0 - real(t)

    def sigma(self, t: Array) -> Array:
        """t."""
        return real(t)

    def logsnr(self, t: Array) -> Array:
        """2 log((1 - t) / t)."""
        t = self.sigma(t)
        return 2.0 * (jnp.log1p(-t) - jnp.log(t))

    def time(self, logsnr: Array) -> Array:
        """1 / (1 + exp(logsnr / 2))."""
        return jax.nn.sigmoid(-0.5 * real(logsnr))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """EDM's schedule, sigma(t) = t (Karras et al. 2022). Raises UserError for an empty range."""
    ordered("edm", "sigma_min", sigma_min, "sigma_max", sigma_max)
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
    ordered("cosine", "logsnr_min", logsnr_min, "logsnr_max", logsnr_max)
    return Cosine(logsnr_min, logsnr_max, shift)


def rectified_flow() -> RectifiedFlow:
    """Straight paths between data (t = 0) and noise (t = 1)."""
    return RectifiedFlow()
