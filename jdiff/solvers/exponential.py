"""Exponential integrators: exact in the linear part; order 1 is alpha_s x0 + sigma_s eps."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import Solver, safe_ratio


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


@struct
class DPMpp2M(Solver):
    """Order 2, one evaluation a step: the previous x0 gives the slope."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def init(self, x: PyTree, times: Array) -> Any:
        """(previous x0, previous t, whether there is one)."""
        blank = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        return jax.tree.map(blank, x), jnp.asarray(times)[0], jnp.asarray(False)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 2 of Lu et al. 2022 (2211.01095), with lambda = log(alpha / sigma)."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        x0_last, t_last, have = memory

        def update(sched: Schedule, x: Array, x0: Array, x0_last: Array) -> Array:
            lam, lam_s, lam_last = (0.5 * sched.logsnr(a) for a in (t, s, t_last))
            h, h_last = lam_s - lam, lam - lam_last
            # 1 / (2 r) with r = h_last / h. First order at the start, and where h is infinite: the
            # step to sigma = 0, and those next to alpha = 0.
            usable = have & jnp.isfinite(h) & jnp.isfinite(h_last)
            slope = jnp.where(usable, 0.5 * safe_ratio(h, h_last), 0.0)
            d = x0 + slope * (x0 - x0_last)
            return sched.sigma(s) / sched.sigma(t) * x - sched.alpha(s) * jnp.expm1(-h) * d

        x_next = schedule_map(update, schedule, x, prediction.x0, x0_last)
        x0 = jax.tree.map(lambda a, old: a.astype(old.dtype), prediction.x0, x0_last)
        return x_next, (x0, t, jnp.asarray(True)), prediction


def ddim(eta: Array | float = 0.0) -> DDIM:
    """DDIM (Song et al. 2021). eta = 0 is deterministic, eta = 1 is DDPM's posterior sampling.

    Raises:
      UserError: eta below 0 or above 1.
    """
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise UserError(f"ddim: eta={eta} given; it lies in [0, 1].")
    return DDIM(eta)


def dpmpp_2m() -> DPMpp2M:
    """DPM-Solver++(2M) (Lu et al. 2022), order 2 with one evaluation a step."""
    return DPMpp2M()


def posterior_std(schedule: Schedule, t: Array, s: Array) -> Array:
    """The standard deviation of q(x_s | x_t, x0), 0 where sigma_s = 0.

    sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2); the ratio is exp((logsnr_t -
    logsnr_s) / 2), so that expm1 keeps the digits of small steps.
    """
    gap = schedule.logsnr(t) - schedule.logsnr(s)
    sigma_s = schedule.sigma(s)
    return jnp.where(sigma_s == 0, 0.0, sigma_s * jnp.sqrt(-jnp.expm1(gap)))
