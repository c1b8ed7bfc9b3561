"""The probability-flow ODE in the variable of one's choice: its slope, and how to follow it.

    variable="t"        dx/dt = alpha'(t) x0 + sigma'(t) eps
    variable="sigma"    d(x / alpha) / d(sigma / alpha) = eps

They are one ODE; a solver's steps differ in what they take to be straight. "t" is the paper's own
for EDM's and flow matching's samplers, and finite at alpha = 0. "sigma" is that of DDIM, PNDM and
k-diffusion: it is the same under every schedule, and the one for a discrete table, whose d alpha /
dt has a kink at every step.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.predictions import Prediction, endpoint_velocity
from jdiff.pytree import Array, PyTree
from jdiff.schedules import Schedule, first, is_schedule, schedule_map
from jdiff.solvers.base import ends_at_data

#: The variables that a solver of the ODE can be written in.
VARIABLES = ("t", "sigma")
#: Given the schedule of a leaf, the weight of each slope but the first; None where there is none.
Weights = Callable[[Schedule], Sequence[Array | float | None]]


def slope(variable: str, schedule: PyTree, prediction: Prediction, t: Array) -> PyTree:
    """The right side of the ODE at time t: a tree like x."""
    return prediction.eps if variable == "sigma" else endpoint_velocity(schedule, prediction, t)


def finite_velocity(where: str, schedule: PyTree, times: Array) -> None:
    """Raises a UserError where the path leaves times[0] with an infinite velocity dx/dt."""
    for sched in jax.tree.leaves(schedule, is_leaf=is_schedule):
        if not bool(_has_rates(sched, times[0])):
            raise UserError(
                f"{where}: d alpha / dt or d sigma / dt of {type(sched).__name__} is infinite at "
                f"times[0]={float(times[0]):.6g}; start below it, or use variable='sigma' or ddim."
            )


@jax.jit
def _has_rates(sched: Schedule, t: Array) -> Array:
    return jnp.all(jnp.isfinite(jnp.stack(sched.rates(t))))


def advance(
    variable: str, schedule: PyTree, x: PyTree, prediction: Prediction, slopes: Sequence[PyTree],
    weights: Weights, t: Array, s: Array,
) -> PyTree:  # fmt: skip
    """From x at t to s along the weighted mean of the slopes, the first of which is that at (x, t).

    The weights sum to one, so those of slopes[1:] say all: they weigh the differences from
    slopes[0]. In "sigma" the mean is added to alpha_s x0 + sigma_s eps, which is finite where alpha
    = 0 at t (the step is of first order there) and true to a prediction whose endpoints do not
    make up x (CFG++). Where sigma_s = 0 the predicted image is returned.
    """

    def update(sched: Schedule, x: Array, x0: Array, *slopes: Array) -> Array:
        alpha_s, sigma_s = sched.alpha(s), sched.sigma(s)
        weighed = zip(weights(sched), slopes[1:], strict=True)
        extra = [w * (d - slopes[0]) for w, d in weighed if w is not None]
        if variable == "t":
            x_s = x + (s - t) * sum(extra, slopes[0])
        else:
            x_s = alpha_s * x0 + sigma_s * slopes[0]
            if extra:
                ratio = sched.sigma_ratio(t)
                finite = jnp.isfinite(ratio)
                # alpha_s (ratio_s - ratio_t), which stays finite where alpha_s = 0
                length = jnp.where(finite, sigma_s - alpha_s * jnp.where(finite, ratio, 1.0), 0.0)
                x_s = x_s + length * sum(extra)
        return jnp.where(sigma_s == 0, alpha_s * x0, x_s)

    return schedule_map(update, schedule, x, prediction.x0, *slopes)


def first_order_only(variable: str, schedule: PyTree, t: Array, s: Array) -> Array:
    """Whether a step is of first order at best: to the data, or (in "sigma") at alpha = 0."""
    to_data = ends_at_data(schedule, s)
    if variable == "t":
        return to_data
    sched = first(schedule)
    return to_data | (sched.alpha(t) == 0) | (sched.alpha(s) == 0)
