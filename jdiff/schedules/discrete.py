"""Schedules that are tables of T noise levels."""

import math

import jax.numpy as jnp

from jdiff.errors import UserError, positive
from jdiff.pytree import Array, static, struct
from jdiff.schedules.base import Schedule, ordered, real


@struct
class Discrete(Schedule):
    """A table of T noise levels: exact at t = 1..T, continuous between, the data at t = 0.

    Variance preserving. t counts noising steps as in Ho et al. 2020: their code's (and diffusers')
    index is t - 1, which is what the network of such a model takes (`time="step"` in
    `predictions`). Between integers the logSNR is interpolated linearly, as k-diffusion does;
    below t = 1, sigma / alpha falls linearly to 0.
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
        t = real(t)
        low = jnp.clip(jnp.floor(t), 1, self.T - 1)  # steps are whole numbers: nothing to search
        i = low.astype(jnp.int32) - 1
        # a select, not a minimum, whose derivative at the tie (t = T) is half
        along = jnp.where(t - low > 1.0, 1.0, t - low)
        inside = self.table[i] + along * (self.table[i + 1] - self.table[i])
        below = self.table[0] - 2.0 * jnp.log(jnp.minimum(t, 1.0))
        return jnp.where(t < 1.0, below, inside)

    def time(self, logsnr: Array) -> Array:
        """The inverse of the interpolation."""
        logsnr = real(logsnr)
        index = jnp.arange(1, self.T + 1, dtype=logsnr.dtype)
        inside = jnp.interp(-logsnr, -self.table, index)
        below = jnp.exp(0.5 * (self.table[0] - logsnr))
        return jnp.where(logsnr > self.table[0], below, inside)


@struct
class Ladder(Discrete):
    """A table of T noise levels with alpha = 1, geometric between its steps."""

    def alpha(self, t: Array) -> Array:
        """1."""
        return jnp.ones_like(real(t))

    def sigma(self, t: Array) -> Array:
        """exp(-logsnr / 2)."""
        return self.sigma_ratio(t)


def ddpm_linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Discrete:
    """The DDPM table: beta_t linear from beta_start to beta_end over T steps (Ho et al. 2020)."""
    return from_betas(_linspace("ddpm_linear", beta_start, beta_end, T))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Discrete:
    """Stable Diffusion's table: sqrt(beta_t) linear over T steps (Rombach et al. 2022, code)."""
    positive("scaled_linear", beta_start=beta_start)
    roots = _linspace("scaled_linear", math.sqrt(beta_start), math.sqrt(beta_end), T)
    return from_betas([root * root for root in roots])


def squared_cosine(T: int = 1000, s: float = 0.008, cap: float = 0.999) -> Discrete:
    """The cosine table of improved DDPM (Nichol and Dhariwal 2021, equation 17).

    abar_t = f(t) / f(0) with f(t) = cos^2(pi / 2 (t / T + s) / (1 + s)), each beta at most `cap`:
    diffusers' squaredcos_cap_v2. `cosine` is its continuous relative, without offset or cap.

    Raises:
      UserError: T is below 2, or cap not in (0, 1).
    """
    _steps("squared_cosine", T)
    f = lambda t: math.cos(0.5 * math.pi * (t / T + s) / (1.0 + s)) ** 2
    return from_betas([min(1.0 - f(t + 1) / f(t), cap) for t in range(T)])


def ncsn(T: int = 10, sigma_min: float = 0.01, sigma_max: float = 1.0) -> Ladder:
    """The noise ladder of annealed Langevin dynamics: T levels in geometric progression, alpha = 1.

    Song and Ermon 2019, section 4.1: T = 10, 1 to 0.01; Song and Ermon 2020 climb higher: T = 232,
    50 to 0.01 for CIFAR-10. Their index falls with noise: their i is our T + 1 - t.

    Raises:
      UserError: T is below 2, sigma_min is not positive, or not below sigma_max.
    """
    positive("ncsn", sigma_min=sigma_min)
    ordered("ncsn", "sigma_min", sigma_min, "sigma_max", sigma_max)
    levels = _linspace("ncsn", -2.0 * math.log(sigma_min), -2.0 * math.log(sigma_max), T)
    return Ladder(jnp.asarray(levels), T)


def from_betas(betas: list[float]) -> Discrete:
    """A `Discrete` schedule from beta_1..beta_T; the products are taken in double precision.

    Raises:
      UserError: a beta outside (0, 1), by its index. A terminal beta of 1 is `zero_terminal_snr`'s.
    """
    log_abar, table = 0.0, []
    for i, beta in enumerate(betas):
        if not 0.0 < beta < 1.0:
            raise UserError(f"from_betas: betas[{i}]={beta} given; allowed are 0 < beta < 1.")
        log_abar += math.log1p(-beta)
        table.append(log_abar - math.log(-math.expm1(log_abar)))  # log(abar / (1 - abar))
    return Discrete(jnp.asarray(table), len(table))


def _steps(where: str, T: int) -> None:
    if T < 2:
        raise UserError(f"{where}: T={T} given; a table needs at least 2 steps.")


def _linspace(where: str, start: float, end: float, T: int) -> list[float]:
    _steps(where, T)
    step = (end - start) / (T - 1)
    return [start + i * step for i in range(T)]
