"""Restart sampling: jumps back up by fresh noise, and down again by a solver of the ODE.

Xu et al. 2023 (2306.14878): noise added in a large lump contracts the errors made so far, as an
SDE's does, while the way down has the ODE's small discretisation error.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, is_concrete, static, struct
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers.base import Solver
from jdiff.solvers.probe import draws_noise


@struct
class Restart(Solver):
    """A solver, and the intervals that it goes through again; see `restart`.

    Attributes:
      solver: of the ODE, for the grid and the restarts alike.
      low, high: `[I]` the ends of the intervals in sigma / alpha.
      steps: how many steps a restart of interval i takes down.
      times: how many restarts of interval i.
      rho: how those steps are spaced, as in `grids.karras`.
      noise: the standard deviation of the fresh noise, S_noise.
    """

    solver: Solver
    low: Array | Sequence[float]
    high: Array | Sequence[float]
    rho: Array | float
    noise: Array | float
    steps: tuple[int, ...] = static()
    times: tuple[int, ...] = static()

    @property
    def order(self) -> int:
        """The solver's."""
        return self.solver.order

    @property
    def evaluations(self) -> int:
        """The solver's, of a step without restarts."""
        return self.solver.evaluations

    def check(self, schedule: PyTree, times: Array) -> None:
        """Refuses a solver that draws noise, and intervals that the grid cannot tell apart."""
        self.solver.check(schedule, times)
        if self.solver.count(2) is None:
            raise UserError("restart: a solver with fixed steps is needed (heun, euler, ...).")
        if draws_noise(self.solver, schedule, times):
            raise UserError(
                "restart: the solver draws noise; the way down is the ODE's (heun, euler, ...)."
            )
        sched, at = first(schedule), self._points(schedule, times).tolist()
        for i, (point, high) in enumerate(zip(at, self.high)):
            low, most = (float(sched.sigma_ratio(jnp.asarray(t))) for t in (point, sched.t_max))
            if not low < high <= most * (1 + 1e-5):
                raise UserError(
                    f"restart: intervals[{i}] starts at the grid's time nearest to its low, where "
                    f"sigma / alpha is {low:.6g}, and ends at high={high:.6g}; high lies above "
                    f"that and is at most {most:.6g}. Use more steps, or another interval."
                )
            if at.index(point) != i:
                raise UserError(
                    f"restart: intervals {at.index(point)} and {i} both start from the grid's "
                    f"t={point:.6g}; use more steps or intervals further apart."
                )

    def count(self, steps: int) -> int:
        """The solver's, and the restarts'."""
        runs = sum(k * (self.solver.count(n + 1) - 1) for k, n in zip(self.times, self.steps))
        return self.solver.count(steps) + runs

    def init(self, x: PyTree, times: Array) -> Any:
        """(the solver's, the grid, which is where intervals start)."""
        return self.solver.init(x, times), jnp.asarray(times)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 1: a step of the solver, then the restarts of the interval that starts at s."""
        inner, grid = memory
        x, inner, prediction = self.solver.step(denoise, schedule, x, inner, t, s, noise, cond)
        here = self._points(schedule, grid) == s
        which = jnp.argmax(here)
        pick = lambda values: jnp.asarray(values)[which]
        top = first(schedule).time(-2.0 * jnp.log(pick(self.high))).astype(s.dtype)
        down = self._grid(schedule, top, s, pick(self.steps))

        def once(i: Array, x: PyTree) -> PyTree:
            raised = self._raise(schedule, x, s, top, noise.free(x, i))
            start = like(raised, x), self.solver.init(x, down)

            def substep(j: Array, carry: tuple) -> tuple:
                x, inner = carry
                new, inner, _ = self.solver.step(
                    denoise, schedule, x, inner, down[j], down[j + 1], noise, cond
                )
                return like(new, x), inner

            return jax.lax.fori_loop(0, pick(self.steps), substep, start)[0]

        times = jnp.where(jnp.any(here), pick(self.times), 0)
        return jax.lax.fori_loop(0, times, once, x), (inner, grid), prediction

    def _points(self, schedule: PyTree, times: Array) -> Array:
        """`[I]`: where intervals start, the grid's times nearest to `low` with noise on them."""
        sched = first(schedule)
        wanted = jnp.asarray(self.low)[:, None]
        gap = jnp.abs(sched.sigma_ratio(times)[None] - wanted)
        usable = (jnp.arange(len(times)) > 0) & (sched.sigma(times) > 0)
        return jnp.asarray(times)[jnp.argmin(jnp.where(usable, gap, jnp.inf), axis=1)]

    def _grid(self, schedule: PyTree, top: Array, s: Array, steps: Array) -> Array:
        """From top to s in so many steps, even in (sigma / alpha)^(1 / rho); then s for ever."""
        sched = first(schedule)
        high, low = (sched.sigma_ratio(a) ** (1.0 / self.rho) for a in (top, s))
        i = jnp.arange(max(self.steps) + 1)
        even = sched.time(-2.0 * self.rho * jnp.log(high + i / steps * (low - high)))
        inside = jnp.where(i >= steps, s, even)
        return jnp.where(i == 0, top, inside).astype(s.dtype)

    def _raise(self, schedule: PyTree, x: PyTree, s: Array, top: Array, z: PyTree) -> PyTree:
        """x at s brought to the higher noise level at top, as q(x_top | x_s) but for S_noise."""

        def up(sched: Schedule, x: Array, z: Array) -> Array:
            a = sched.alpha(top) / sched.alpha(s)
            gap = jnp.maximum(sched.logsnr(s) - sched.logsnr(top), 0.0)
            return a * x + self.noise * a * sched.sigma(s) * jnp.sqrt(jnp.expm1(gap)) * z

        return schedule_map(up, schedule, x, z)


def restart(
    solver: Solver, intervals: Sequence[tuple[float, float, int, int]],
    rho: Array | float = 7.0, noise: Array | float = 1.0,
) -> Restart:  # fmt: skip
    """Restart sampling (Xu et al. 2023, algorithm 1) around a deterministic solver.

    Once the grid is down at `low`, noise is added up to `high` and the solver goes down again in
    `steps` steps; this `times` times. The grid's time nearest to `low` is what counts as `low`. A
    restart costs as many evaluations as its steps do.

    Args:
      solver: of the ODE; the paper's is heun().
      intervals: (low, high, steps, times) each, low and high in sigma / alpha.
      rho: the spacing of the steps (`grids.karras`).
      noise: the standard deviation of the fresh noise, S_noise.

    Raises:
      UserError: no interval, one that is empty or not positive, steps or times below 1; when
        sampling: a solver that draws noise, two intervals at one time of the grid.

    >>> solver = restart(heun(), [(0.06, 0.30, 5, 10)])  # 5 steps from 0.30 to 0.06, ten times
    """
    if not intervals:
        raise UserError("restart: intervals is empty; give (low, high, steps, times).")
    for i, (low, high, steps, times) in enumerate(intervals):
        if is_concrete((low, high)) and not 0 < low < high:
            raise UserError(
                f"restart: intervals[{i}] has low={low} and high={high}; 0 < low < high is needed."
            )
        if steps < 1 or times < 1:
            raise UserError(
                f"restart: intervals[{i}] has steps={steps} and times={times}; both are at least 1."
            )
    low, high, steps, times = zip(*intervals)
    return Restart(solver, low, high, rho, noise, steps, times)


def like(x: PyTree, old: PyTree) -> PyTree:
    """x in the dtypes of old."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), x, old)
