"""Ancestral samplers: a deterministic step to less noise than asked for, and the rest is new.

Every sampler that k-diffusion calls ancestral is one of these: from t to a time below s, at which

    (sigma_down / alpha_down)^2 = (sigma_s / alpha_s)^2 - up^2,
    up = eta (sigma_s / alpha_s) sqrt(1 - SNR_t / SNR_s),

by any deterministic step, then back to s with noise of deviation alpha_s up. For eta = 1 and DDIM's
step it is DDPM's posterior.
"""

from typing import Any, ClassVar

import jax.numpy as jnp

from jdiff.errors import not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, struct
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers.base import Solver
from jdiff.solvers.dpmpp import dpmpp_2s
from jdiff.solvers.exponential import ddim
from jdiff.solvers.ode import dpm_2
from jdiff.solvers.res import res_multistep

Number = Array | float


@struct
class Ancestral(Solver):
    """A deterministic solver's step, with a share of the noise renewed.

    Attributes:
      inner: the deterministic solver.
      eta: the share of the posterior's deviation that is new.
      s_noise: the deviation of the new noise, in units of the one that keeps the marginals.
    """

    inner: Solver
    eta: Number = 1.0
    s_noise: Number = 1.0

    order: ClassVar[int] = 1

    @property
    def evaluations(self) -> int:
        """Those of the inner solver."""
        return self.inner.evaluations

    def check(self, schedule: PyTree, times: Array) -> None:
        """What the inner solver refuses."""
        self.inner.check(schedule, times)

    def init(self, x: PyTree, times: Array) -> Any:
        """The inner solver's memory."""
        return self.inner.init(x, times)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """The module's two moves."""
        sched = first(schedule)
        keep, _ = levels(sched, t, s, self.eta)
        t_down = jnp.where(keep == 1.0, s, sched.time(sched.logsnr(s) - 2.0 * jnp.log(keep)))
        x_down, memory, prediction = self.inner.step(
            denoise, schedule, x, memory, t, t_down.astype(s.dtype), noise, cond
        )

        def renoise(sched: Schedule, x: Array, z: Array) -> Array:
            # Each leaf on its own schedule: sigma_s^2 - (alpha_s / alpha_down sigma_down)^2.
            gap = sched.logsnr(s) - sched.logsnr(t_down)
            same = (keep == 1.0) | (sched.sigma(s) == 0)
            up = jnp.where(same, 0.0, jnp.sqrt(-jnp.expm1(jnp.where(same, 0.0, gap))))
            scale = jnp.where(same, 1.0, sched.alpha(s) / sched.alpha(t_down))
            return scale * x + sched.sigma(s) * up * self.s_noise * z

        z = noise.between(x, t, s)
        return schedule_map(renoise, schedule, x_down, z), memory, prediction


def ancestral(inner: Solver, eta: Number = 1.0, s_noise: Number = 1.0) -> Ancestral:
    """The ancestral sampler of a deterministic solver: weak order 1 for eta > 0, `inner` for 0.

    Args:
      inner: a solver that draws no noise.
      eta: 0 or more; above 1 the noise is more than the posterior's, and at most all of it.
      s_noise: k-diffusion's factor on the noise; 1 keeps the marginals.

    Raises:
      UserError: a negative eta or s_noise.
    """
    not_negative("ancestral", eta=eta, s_noise=s_noise)
    return Ancestral(inner, eta, s_noise)


def euler_ancestral(eta: Number = 1.0, s_noise: Number = 1.0) -> Ancestral:
    """k-diffusion's sample_euler_ancestral: DDIM with its eta, free of the bound 1."""
    return ancestral(ddim(), eta, s_noise)


def dpm_2_ancestral(eta: Number = 1.0, s_noise: Number = 1.0) -> Ancestral:
    """k-diffusion's sample_dpm_2_ancestral: `dpm_2`, two evaluations a step."""
    return ancestral(dpm_2(), eta, s_noise)


def dpmpp_2s_ancestral(eta: Number = 1.0, s_noise: Number = 1.0) -> Ancestral:
    """k-diffusion's sample_dpmpp_2s_ancestral: `dpmpp_2s`, two evaluations a step."""
    return ancestral(dpmpp_2s(), eta, s_noise)


def res_multistep_ancestral(eta: Number = 1.0, s_noise: Number = 1.0) -> Ancestral:
    """`res_multistep` made ancestral (ComfyUI's name), one evaluation a step."""
    return ancestral(res_multistep(), eta, s_noise)


def levels(sched: Schedule, t: Array, s: Array, eta: Number) -> tuple[Array, Array]:
    """(keep, up), keep^2 + up^2 = 1: the shares of sigma_s that are carried over and new."""
    gap = sched.logsnr(t) - sched.logsnr(s)  # -2 h
    new = -jnp.expm1(gap)
    keep = jnp.sqrt(jnp.maximum(jnp.exp(gap) + (1.0 - eta**2) * new, 0.0))
    keep = jnp.where(eta == 0, 1.0, keep)
    return keep, jnp.minimum(eta * jnp.sqrt(new), 1.0)
