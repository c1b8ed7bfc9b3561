"""Euler and Heun on the probability-flow ODE in t: dx/dt = alpha'(t) x0 + sigma'(t) eps.

With schedules.edm this is algorithm 1 of Karras et al. 2022 (2206.00364); with rectified_flow it is
the sampler of Liu et al. 2022. Euler in sigma / alpha instead of t is `ddim`.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.noise import Noise
from jdiff.predictions import Prediction, endpoint_velocity
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import Solver, ends_at_data


@struct
class Euler(Solver):
    """Order 1."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """x + (s - t) dx/dt."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        velocity = endpoint_velocity(schedule, prediction, t)
        return euler_update(schedule, x, velocity, prediction, t, s), memory, prediction


@struct
class Heun(Solver):
    """Order 2, two evaluations a step; the step to the data is Euler's, so 2 n - 1 in all."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """The trapezoidal rule on dx/dt."""
        x_next, prediction = heun_update(denoise, schedule, x, t, s, cond)
        return x_next, memory, prediction


def euler() -> Euler:
    """Euler's method in t, order 1."""
    return Euler()


def heun() -> Heun:
    """Heun's method in t, order 2: EDM's deterministic sampler (algorithm 1)."""
    return Heun()


def euler_update(
    schedule: PyTree, x: PyTree, velocity: PyTree, prediction: Prediction, t: Array, s: Array
) -> PyTree:
    """x + (s - t) velocity; where sigma(s) = 0, the predicted image alpha(s) x0."""

    def update(sched: Schedule, x: Array, d: Array, x0: Array) -> Array:
        return jnp.where(sched.sigma(s) == 0, sched.alpha(s) * x0, x + (s - t) * d)

    return schedule_map(update, schedule, x, velocity, prediction.x0)


def heun_update(
    denoise: Any, schedule: PyTree, x: PyTree, t: Array, s: Array, cond: PyTree
) -> tuple[PyTree, Prediction]:
    """One Heun step from t to s, and the prediction at (x, t). The names are algorithm 1's."""
    prediction = denoise(x, broadcast_time(t, x), cond)
    d = endpoint_velocity(schedule, prediction, t)
    x_next = euler_update(schedule, x, d, prediction, t, s)

    def correct(x_next: PyTree) -> PyTree:
        d_prime = endpoint_velocity(schedule, denoise(x_next, broadcast_time(s, x), cond), s)
        return jax.tree.map(lambda x, a, b: x + (s - t) * (0.5 * a + 0.5 * b), x, d, d_prime)

    # A branch, not a select: the last step must not evaluate the denoiser at sigma = 0.
    return jax.lax.cond(ends_at_data(schedule, s), lambda x: x, correct, x_next), prediction
