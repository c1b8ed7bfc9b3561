"""What every schedule offers, trees of schedules, and the precision of times."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, prefix_map


class Schedule:
    """What a schedule offers. A subclass defines `alpha`, `sigma`, `logsnr`, `time` and its domain.

    All functions take and return arrays of any shape; t is in the schedule's own units.
    """

    t_min: float
    t_max: float
    t_data: float = 0.0
    #: The number of steps of a discrete table, whose times are 0..T; None if continuous.
    T: int | None = None

    def alpha(self, t: Array) -> Array:
        """The signal level, 1 at the data."""
        return jnp.sqrt(jax.nn.sigmoid(self.logsnr(t)))

    def sigma(self, t: Array) -> Array:
        """The noise level, 0 at the data."""
        return jnp.sqrt(jax.nn.sigmoid(-self.logsnr(t)))

    def logsnr(self, t: Array) -> Array:
        """2 log(alpha / sigma): strictly falling, +inf at the data."""
        raise NotImplementedError  # abstract

    def time(self, logsnr: Array) -> Array:
        """The inverse of `logsnr`."""
        raise NotImplementedError  # abstract

    def sigma_ratio(self, t: Array) -> Array:
        """sigma / alpha: the noise level in EDM's units, those of the karras grid and of churn."""
        return jnp.exp(-0.5 * self.logsnr(t))

    def warp(self, t: Array, shift: Array) -> Array:
        """The time at which the logSNR is that at t plus 2 log shift (see `shifted`)."""
        return self.time(self.logsnr(t) + 2.0 * jnp.log(shift))

    def rates(self, t: Array) -> tuple[Array, Array]:
        """(d alpha / dt, d sigma / dt), the coefficients of the velocity dx/dt on (x0, eps)."""
        t = real(t)
        one = jnp.ones_like(t)
        return jax.jvp(self.alpha, (t,), (one,))[1], jax.jvp(self.sigma, (t,), (one,))[1]

    def drift(self, t: Array) -> Array:
        """f(t) = d log alpha / dt of the forward SDE dx = f x dt + g dw (Song et al. 2021)."""
        return self.rates(t)[0] / self.alpha(t)

    def diffusion(self, t: Array) -> Array:
        """g(t) of the forward SDE: g^2 = d sigma^2 / dt - 2 f sigma^2."""
        rate = self.rates(t)[1]
        sigma = self.sigma(t)
        return jnp.sqrt(jnp.maximum(2.0 * sigma * (rate - self.drift(t) * sigma), 0.0))


def is_schedule(x: Any) -> bool:
    """Whether x is one schedule, the leaf of a prefix tree of schedules."""
    return isinstance(x, Schedule)


def schedule_map(fn: Callable[..., Any], schedule: PyTree, x: PyTree, *rest: PyTree) -> PyTree:
    """Maps `fn(schedule, x_leaf, *rest_leaves)` over x, each leaf with the schedule that serves it.

    `schedule` is one schedule or a pytree prefix of x with schedules as leaves.
    """
    return prefix_map(fn, schedule, is_schedule, x, *rest)


def first(schedule: PyTree) -> Schedule:
    """The schedule of the first leaf: what a grid or a time distribution refers to.

    Raises:
      UserError: there is no schedule in the tree.
    """
    found = [s for s in jax.tree.leaves(schedule, is_leaf=is_schedule) if is_schedule(s)]
    if not found:
        raise UserError(f"schedule: a Schedule (or a tree of them) is needed, given {schedule!r}.")
    return found[0]


def finite_data(where: str, schedule: Schedule) -> None:
    """Raises a UserError where the data lies at no finite t, so that the way there has no length.

    For what divides [t_data, t_max] evenly in t.
    """
    if math.isinf(schedule.t_data):
        raise UserError(
            f"{where}: {type(schedule).__name__} has its data at t = {schedule.t_data}; a schedule "
            "whose data lies at a finite t is needed, e.g. edm, cosine or rectified_flow."
        )


def real(t: Any) -> Array:
    """t as an array in its own dtype, but never below float32; a number in jax's default."""
    if not hasattr(t, "dtype"):
        return jnp.asarray(t, jnp.result_type(float))
    # asarray first: without x64 numpy's float64 is float32 here
    t = jnp.asarray(t)
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def lost(t: Array, n: Array) -> Array:
    """1 - (1 - t)^n with its digits at small t, and with its derivative at t = 1."""
    t = real(t)
    early = t < 0.5
    small = jnp.where(early, t, 0.0)
    return jnp.where(early, -jnp.expm1(n * jnp.log1p(-small)), 1.0 - (1.0 - t) ** n)


def ordered(where: str, low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises a UserError unless low < high, where both are plain numbers."""
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise UserError(f"{where}: {low_name}={low} must be below {high_name}={high}.")
