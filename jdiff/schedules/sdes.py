"""The paths of known SDEs: EDM, variance exploding, variance preserving, sub-VP."""

import math

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, positive
from jdiff.pytree import Array, is_concrete, struct
from jdiff.schedules.base import Schedule, ordered, real


class Exploding(Schedule):
    """alpha = 1: noise is added and the data never scaled. A subclass defines sigma and logsnr."""

    def alpha(self, t: Array) -> Array:
        """1."""
        return jnp.ones_like(real(t))

    def sigma(self, t: Array) -> Array:
        """exp(-logsnr / 2)."""
        return self.sigma_ratio(t)


@struct
class EDM(Exploding):
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

    def sigma(self, t: Array) -> Array:
        """t."""
        return real(t)

    def logsnr(self, t: Array) -> Array:
        """-2 log t."""
        return -2.0 * jnp.log(real(t))

    def time(self, logsnr: Array) -> Array:
        """exp(-logsnr / 2)."""
        return jnp.exp(-0.5 * real(logsnr))


@struct
class VE(Exploding):
    """sigma = sigma_min (sigma_max / sigma_min)^t on [0, 1] (Song et al. 2021, equation 30).

    sigma(0) is sigma_min: the data itself lies at t = -inf, `t_data`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    t_min, t_max, t_data = 0.0, 1.0, -math.inf

    @property
    def _log_ratio(self) -> Array:
        return jnp.log(self.sigma_max) - jnp.log(self.sigma_min)

    def sigma(self, t: Array) -> Array:
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * jnp.exp(real(t) * self._log_ratio)

    def logsnr(self, t: Array) -> Array:
        """-2 log sigma, linear in t."""
        return -2.0 * (jnp.log(self.sigma_min) + real(t) * self._log_ratio)

    def time(self, logsnr: Array) -> Array:
        """log(sigma / sigma_min) / log(sigma_max / sigma_min)."""
        return (-0.5 * real(logsnr) - jnp.log(self.sigma_min)) / self._log_ratio


@struct
class VESqrt(Exploding):
    """sigma = sqrt(t): Brownian motion, dx = dw (Karras et al. 2022, table 1, column VE)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def t_min(self) -> float:
        """sigma_min^2."""
        return self.sigma_min**2

    @property
    def t_max(self) -> float:
        """sigma_max^2."""
        return self.sigma_max**2

    def sigma(self, t: Array) -> Array:
        """sqrt(t)."""
        return jnp.sqrt(real(t))

    def logsnr(self, t: Array) -> Array:
        """-log t."""
        return -jnp.log(real(t))

    def time(self, logsnr: Array) -> Array:
        """exp(-logsnr)."""
        return jnp.exp(-real(logsnr))


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

    def _time_of(self, integral: Array) -> Array:
        """The root of the quadratic B(t) = integral, in its stable form."""
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral)
        return 2.0 * integral / (self.beta_min + root)

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
        """The time at which B = log(1 + exp(-logsnr))."""
        return self._time_of(jax.nn.softplus(-real(logsnr)))


@struct
class SubVP(VPLinear):
    """alpha of `VPLinear`, sigma = 1 - alpha^2: less noise (Song et al. 2021, equation 29)."""

    def sigma(self, t: Array) -> Array:
        """1 - exp(-B)."""
        return -jnp.expm1(-self._integral(t))

    def logsnr(self, t: Array) -> Array:
        """-2 log(2 sinh(B / 2))."""
        return -2.0 * jnp.log(2.0 * jnp.sinh(0.5 * self._integral(t)))

    def time(self, logsnr: Array) -> Array:
        """The time at which B = 2 asinh(exp(-logsnr / 2) / 2)."""
        return self._time_of(2.0 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * real(logsnr))))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """EDM's schedule, sigma(t) = t (Karras et al. 2022).

    Raises:
      UserError: sigma_min is not positive, or not below sigma_max.
    """
    positive("edm", sigma_min=sigma_min)
    ordered("edm", "sigma_min", sigma_min, "sigma_max", sigma_max)
    return EDM(sigma_min, sigma_max)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> VE:
    """The variance-exploding SDE (Song et al. 2021, equation 30): geometric in t on [0, 1].

    sigma never reaches 0 at a finite t: `t_data` is -inf, and grids end there.

    Raises:
      UserError: sigma_min is not positive, or not below sigma_max.
    """
    positive("ve", sigma_min=sigma_min)
    ordered("ve", "sigma_min", sigma_min, "sigma_max", sigma_max)
    return VE(sigma_min, sigma_max)


def ve_sqrt(sigma_min: float = 0.02, sigma_max: float = 100.0) -> VESqrt:
    """EDM's variant of VE, sigma = sqrt(t) (Karras et al. 2022, table 1): the same path as `ve`.

    t runs over [sigma_min^2, sigma_max^2] and the data lies at t = 0.

    Raises:
      UserError: sigma_min is not positive, or not below sigma_max.
    """
    positive("ve_sqrt", sigma_min=sigma_min)
    ordered("ve_sqrt", "sigma_min", sigma_min, "sigma_max", sigma_max)
    return VESqrt(sigma_min, sigma_max)


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> VPLinear:
    """The variance-preserving SDE with linear beta (Song et al. 2021). t in [t_min, 1].

    Raises:
      UserError: beta_min is not positive, or above beta_max.
    """
    _betas("vp_linear", beta_min, beta_max)
    return VPLinear(beta_min, beta_max, t_min)


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> SubVP:
    """The sub-VP SDE (Song et al. 2021, equation 29): drift -beta x / 2, and a smaller variance.

    Raises:
      UserError: beta_min is not positive, or above beta_max.
    """
    _betas("sub_vp", beta_min, beta_max)
    return SubVP(beta_min, beta_max, t_min)


def _betas(where: str, beta_min: float, beta_max: float) -> None:
    if is_concrete((beta_min, beta_max)) and not 0 < beta_min <= beta_max:  # equal: constant beta
        raise UserError(
            f"{where}: beta_min={beta_min} and beta_max={beta_max} given; "
            "allowed are 0 < beta_min <= beta_max."
        )
