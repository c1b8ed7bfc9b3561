"""Samplers of networks that jump: consistency models and flow maps, in one step or a few."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.predictions import Prediction, corrupt
from jdiff.pytree import Array, PyTree, broadcast_time, is_concrete, struct
from jdiff.schedules import Schedule, is_schedule
from jdiff.solvers.base import Solver


@struct
class Consistency(Solver):
    """To the data in one evaluation, and back to a lower noise level with new noise."""

    order: ClassVar[int] = 0  # no ODE is solved: the marginals are right where the jump is
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """alpha_s f(x, t) + sigma_s z: algorithm 1 of Song et al. 2023."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        return corrupt(schedule, prediction.x0, noise.free(x), s), memory, prediction


@struct
class FlowMap(Solver):
    """One evaluation a step, in which the network is told where the step ends."""

    order: ClassVar[int] = 1  # with a network that does not listen it is Euler's method
    evaluations: ClassVar[int] = 1

    def check(self, schedule: PyTree, times: Array) -> None:
        """Refuses a schedule whose path is not a straight line in t."""
        for s in jax.tree.leaves(schedule, is_leaf=is_schedule):
            if is_concrete(s) and not _is_straight(s):
                raise UserError(
                    f"flow_map: {type(s).__name__} given; an average velocity needs a schedule "
                    "whose alpha and sigma are linear in t, as those of rectified_flow and edm."
                )

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """x + (s - t) u(x, t, s), which on a straight path is alpha_s x0 + sigma_s eps."""
        target_time = {"s": broadcast_time(s, x)}
        prediction = denoise(x, broadcast_time(t, x), {**(cond or {}), **target_time})
        return corrupt(schedule, prediction.x0, prediction.eps, s), memory, prediction


def consistency() -> Consistency:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1); one step is f(x_T, T).

    The paper adds noise of variance s^2 - t_min^2, as if f returned x at t_min; here it returns the
    data, and the noise is all of sigma_s.
    """
    return Consistency()


def flow_map() -> FlowMap:
    """The sampler of MeanFlow (Geng et al. 2025, algorithm 2) and shortcut models (Frans et al.
    2024, algorithm 2): any number of steps, one included.

    A step from t to s asks the denoiser with s in cond["s"] `[B]`, in the units of t; the last one
    asks for the map to the data, s = t_data.
    """
    return FlowMap()


def _is_straight(schedule: Schedule) -> bool:
    """Whether alpha and sigma are linear in t, so that x_s = x_t + (s - t) u for one u."""
    ends = jnp.asarray([schedule.t_data, schedule.t_max], jnp.result_type(float))
    t = ends[0] + jnp.linspace(0.0, 1.0, 5) * (ends[1] - ends[0])
    lines = [(f(t), jnp.linspace(*f(ends), 5)) for f in (schedule.alpha, schedule.sigma)]
    size = jnp.maximum(schedule.sigma(ends[1]), 1.0)
    return bool(all(jnp.allclose(a, b, rtol=0.0, atol=1e-4 * size) for a, b in lines))
