"""Data N(M, V) in every dimension: its velocity and flow between any two times, in closed form.

Along a trajectory (x - alpha M) / sqrt(alpha^2 V + sigma^2) is constant. Nothing here is computed
by the code under test.
"""

import jax.numpy as jnp

from jdiff import denoisers, schedules
from jdiff.predictions import parameterization

M, V = 0.7, 0.09


def denoiser(schedule):
    """The exact denoiser of the data, in one dimension."""
    return denoisers.mixture(jnp.full((1, 1), M), V, schedule)


def to(schedule, x, t, s):
    """Where the trajectory through x `[B, D]` at t `[B]` is at s `[B]`."""
    spread = lambda t: jnp.sqrt(schedule.alpha(t) ** 2 * V + schedule.sigma(t) ** 2)
    along = (x - (schedule.alpha(t) * M)[:, None]) / spread(t)[:, None]
    return (schedule.alpha(s) * M)[:, None] + spread(s)[:, None] * along


def average_velocity(x, t, s):
    """(x - x_s) / (t - s) on rectified flow, written so that s = t is no exception."""
    h = lambda t: jnp.sqrt((1 - t) ** 2 * V + t**2)
    slope = (t + s - V * (2 - t - s)) / (h(t) * (h(t) + h(s)))
    return -M + slope[:, None] * (x - ((1 - t) * M)[:, None])


def flow_map(b=0.0):
    """The flow of the data as a network with one parameter: off by b (1 + x), exact at b = 0."""
    return denoisers.network(
        _apply, {"b": jnp.asarray(b)}, schedules.rectified_flow(), parameterization("velocity")
    )


def _apply(params, x, t, cond, key):
    t = t.astype(x.dtype)  # networks are told it in float32
    return average_velocity(x, t, cond["s"]) + params["b"] * (1.0 + x)


def network(fn, schedule, target="x0", params=None):
    """x0 (or another target) = fn(params, x, t, cond) as a network."""
    return denoisers.network(
        lambda params, x, t, cond, key: fn(params, x, t, cond), params or {}, schedule,
        parameterization(target, time="t"),
    )  # fmt: skip
