"""DDIM, the exponential integrator of order 1, and its DDPM side; higher orders add to its step."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import Solver


@struct
class DDIM(Solver):
    """Order 1 on the ODE for eta = 0; DDPM's ancestral step for eta = 1."""

    eta: Array | float = 0.0

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Equation 12 of Song et al. 2021: alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z."""
        prediction = denoise(x, broadcast_time(t, x), cond)

        def update(sched: Schedule, x0: Array, eps: Array, z: Array) -> Array:
            sigma_s = sched.sigma(s)
            std = self.eta * posterior_std(sched, t, s)
            direction = jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0))
            return sched.alpha(s) * x0 + direction * eps + std * z

        z = jax.lax.cond(
            jnp.any(self.eta > 0),  # the deterministic sampler draws nothing
            lambda: noise.between(x, t, s),
            lambda: jax.tree.map(jnp.zeros_like, x),
        )
        x_next = schedule_map(update, schedule, prediction.x0, prediction.eps, z)
        return x_next, memory, prediction


def ddim(eta: Array | float = 0.0) -> DDIM:
    """DDIM (Song et al. 2021). eta = 0 is deterministic, eta = 1 is DDPM's posterior sampling.

    Raises:
      UserError: eta below 0 or above 1.
    """
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise UserError(f"ddim: eta={eta} given; it lies in [0, 1].")
    return DDIM(eta)


def ddim_update(schedule: PyTree, prediction: Prediction, s: Array) -> PyTree:
    """alpha_s x0 + sigma_s eps: DDIM's step to s, whatever the time of the prediction."""
    mix = lambda sched, x0, eps: sched.alpha(s) * x0 + sched.sigma(s) * eps
    return schedule_map(mix, schedule, prediction.x0, prediction.eps)


def posterior_std(schedule: Schedule, t: Array, s: Array) -> Array:
    """The standard deviation of q(x_s | x_t, x0), 0 where sigma_s = 0.

    sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2); the ratio is exp((logsnr_t -
    logsnr_s) / 2), so that expm1 keeps the digits of small steps.
    """
    gap = schedule.logsnr(t) - schedule.logsnr(s)
    sigma_s = schedule.sigma(s)
    return jnp.where(sigma_s == 0, 0.0, sigma_s * jnp.sqrt(jnp.maximum(-jnp.expm1(gap), 0.0)))
