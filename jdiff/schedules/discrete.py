"""Schedules that are tables of T noise levels."""

import math

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, static, struct
from jdiff.schedules.base import Schedule, real


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
        t = real(t)
        inside = jnp.interp(t, jnp.arange(1, self.T + 1, dtype=t.dtype), self.table)
        below = self.table[0] - 2.0 * jnp.log(jnp.minimum(t, 1.0))
        return jnp.where(t < 1.0, below, inside)

    def time(self, logsnr: Array) -> Array:
        """The inverse of the interpolation."""
        logsnr = real(logsnr)
        index = jnp.arange(1, self.T + 1, dtype=logsnr.dtype)
        inside = jnp.interp(-logsnr, -self.table, index)
        below = jnp.exp(0.5 * (self.table[0] - logsnr))
        return jnp.where(logsnr > self.table[0], below, inside)


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
