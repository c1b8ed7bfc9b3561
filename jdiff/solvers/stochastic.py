"""Stochastic samplers: DDPM's ancestral steps, and EDM's churn."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers.base import Solver
from jdiff.solvers.exponential import posterior_std
from jdiff.solvers.ode import heun_update
from jdiff.solvers.variables import finite_velocity


@struct
class DDPM(Solver):
    """Ancestral sampling: the posterior mean, and a variance between its two bounds."""

    variance: Array | float = 0.0

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Equations 6 and 7 of Ho et al. 2020, for any two times."""
        prediction = denoise(x, broadcast_time(t, x), cond)

        def update(sched: Schedule, x0: Array, eps: Array, z: Array, v: Array) -> Array:
            alpha_s, sigma_s, sigma_t = sched.alpha(s), sched.sigma(s), sched.sigma(t)
            # Posterior mean: alpha_s x0 + (alpha_t sigma_s^2 / (alpha_s sigma_t)) eps.
            gap = sched.logsnr(t) - sched.logsnr(s)
            ratio = jnp.exp(0.5 * gap)  # alpha_t sigma_s / (alpha_s sigma_t)
            small = posterior_std(sched, t, s)  # of q(x_s | x_t, x0)
            large = sigma_t * jnp.sqrt(-jnp.expm1(gap))  # of q(x_t | x_s)
            std = small ** (1.0 - v) * large**v
            return alpha_s * x0 + sigma_s * ratio * eps + jnp.where(sigma_s == 0, 0.0, std) * z

        z = noise.between(x, t, s)
        v = prediction.variance  # learned, where the network says one
        if v is None:
            v = jax.tree.map(lambda _: self.variance, prediction.x0)
        x_next = schedule_map(update, schedule, prediction.x0, prediction.eps, z, v)
        return x_next, memory, prediction


@struct
class EDMChurn(Solver):
    """Heun's step from a noise level raised by fresh noise. The leaves are the paper's numbers."""

    churn: Array | float
    s_min: Array | float
    s_max: Array | float
    s_noise: Array | float

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def check(self, schedule: PyTree, times: Array) -> None:
        """Refuses an infinite velocity at the start: Heun's step is in t."""
        finite_velocity("edm", schedule, times)

    def init(self, x: PyTree, times: Array) -> Any:
        """The number of steps N, among which churn is shared out."""
        return jnp.asarray(len(times) - 1, jnp.float32)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 2 of Karras et al. 2022, in sigma / alpha for any schedule."""
        sched = first(schedule)
        sigma = sched.sigma_ratio(t)
        inside = (self.s_min <= sigma) & (sigma <= self.s_max) & jnp.isfinite(sigma)
        gamma = jnp.where(inside, jnp.minimum(self.churn / memory, jnp.sqrt(2.0) - 1.0), 0.0)
        t_hat = jnp.where(gamma > 0, sched.time(sched.logsnr(t) - 2.0 * jnp.log1p(gamma)), t)

        def raise_noise(sched: Schedule, x: Array, z: Array) -> Array:
            same = t_hat == t
            scale = jnp.where(same, 1.0, sched.alpha(t_hat) / sched.alpha(t))
            # sigma_hat^2 - (scale sigma)^2 as a product: a difference rounds to noise at churn 0.
            gap = jnp.where(same, 0.0, sched.logsnr(t) - sched.logsnr(t_hat))
            added = scale * sched.sigma(t) * jnp.sqrt(jnp.maximum(jnp.expm1(gap), 0.0))
            return scale * x + added * self.s_noise * z

        x_hat = schedule_map(raise_noise, schedule, x, noise.free(x))
        x_next, prediction = heun_update(denoise, schedule, x_hat, t_hat, s, cond)
        return x_next, memory, prediction


def ddpm(variance: Array | float = 0.0) -> DDPM:
    """DDPM's ancestral sampler (Ho et al. 2020), for any grid.

    Args:
      variance: 0 is the posterior's ("fixedsmall"), 1 is beta ("fixedlarge"), values between
        interpolate their logarithms (Nichol and Dhariwal 2021, equation 15). A network that learned
        its variance overrules it.

    Raises:
      UserError: a variance outside [0, 1].
    """
    if isinstance(variance, int | float) and not 0 <= variance <= 1:
        raise UserError(f"ddpm: variance={variance} given; it lies in [0, 1].")
    return DDPM(variance)


def edm(
    churn: Array | float = 0.0, s_min: Array | float = 0.0, s_max: Array | float = jnp.inf,
    noise: Array | float = 1.0,
) -> EDMChurn:  # fmt: skip
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2); churn = 0 is `heun`.

    Args:
      churn: S_churn; each step raises the noise level by min(churn / N, sqrt(2) - 1).
      s_min, s_max: S_tmin and S_tmax, the range of sigma / alpha in which noise is added.
      noise: S_noise, the standard deviation of the fresh noise.

    ImageNet-64 in the paper: edm(churn=40, s_min=0.05, s_max=50, noise=1.003), 256 steps.
    """
    not_negative("edm", churn=churn)
    return EDMChurn(churn, s_min, s_max, noise)
