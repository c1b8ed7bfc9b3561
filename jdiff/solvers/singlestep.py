"""What singlestep exponential integrators share: DDIM's step, refined by stages inside the step.

A stage is DDIM's step to an inner time, the denoiser's answer there, and its difference to the
answer at the start, weighted as in `phi`. Steps of infinite length in lambda (from alpha = 0, to
sigma = 0) and of none are DDIM's, and evaluate nothing more.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers.base import Solver
from jdiff.solvers.exponential import ddim_update


def has_inside(schedule: PyTree, t: Array, s: Array) -> Array:
    """Whether there are times between t and s: the step is finite in log SNR, and not empty."""
    h = first(schedule).logsnr(s) - first(schedule).logsnr(t)
    return jnp.isfinite(h) & (h != 0)


def inner_time(schedule: PyTree, t: Array, s: Array, r: Array | float) -> Array:
    """The time at the fraction r of the way from t to s in the log SNR of the first leaf."""
    sched = first(schedule)
    start = sched.logsnr(t)
    return sched.time(start + r * (sched.logsnr(s) - start))


def refined(
    schedule: PyTree, weights: Callable[..., list[Array]], of: str,
    start: Prediction, stage: Prediction, t: Array, u: Array, s: Array,
) -> PyTree:  # fmt: skip
    """x_s from the predictions at t and at u, a time inside the step or its end.

    Each leaf takes the node from its own schedule, so that a tree keeps its order.
    """

    def update(sched: Schedule, x0: Array, eps: Array, y: Array, y_u: Array) -> Array:
        lam, lam_u, lam_s = (0.5 * sched.logsnr(a) for a in (t, u, s))
        h, ahead = lam_s - lam, lam_u - lam
        ok = jnp.isfinite(h) & (h != 0) & jnp.isfinite(ahead) & (ahead != 0)
        h, ahead = jnp.where(ok, h, 1.0), jnp.where(ok, ahead, 1.0)
        z, lead = (-h, sched.alpha(s)) if of == "x0" else (h, sched.sigma(s))
        (w,) = weights(z, [ahead / h])
        c = jnp.where(ok, -lead * z * w, 0.0)
        return sched.alpha(s) * x0 + sched.sigma(s) * eps + c * (y_u - y)

    y, y_u = getattr(start, of), getattr(stage, of)
    return schedule_map(update, schedule, start.x0, start.eps, y, y_u)


@struct
class TwoStage(Solver):
    """A method is its `weights` for one node, and of what: "x0" or "eps"."""

    r: Array | float = 0.5

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2
    of: ClassVar[str]

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """Of the one inner node; see `phi`."""
        raise NotImplementedError  # abstract

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """A stage at the fraction r of the step, and the step refined by it."""
        start = denoise(x, broadcast_time(t, x), cond)

        def two_stages() -> PyTree:
            u = inner_time(schedule, t, s, self.r)
            stage = denoise(ddim_update(schedule, start, u), broadcast_time(u, x), cond)
            return refined(schedule, self.weights, self.of, start, stage, t, u, s)

        inside = has_inside(schedule, t, s)
        return (
            jax.lax.cond(inside, two_stages, lambda: ddim_update(schedule, start, s)),
            memory,
            start,
        )
