"""Explicit Runge-Kutta methods on the probability-flow ODE, in t or in sigma / alpha.

In t, with schedules.edm, `heun` is algorithm 1 of Karras et al. 2022 (2206.00364); with
rectified_flow, `euler` is the sampler of Liu et al. 2022. In sigma, `euler` is DDIM. On a discrete
table take variable="sigma" (see jdiff.solvers.variables).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, is_concrete, static, struct
from jdiff.schedules import first, is_schedule
from jdiff.solvers.base import Solver
from jdiff.solvers.variables import VARIABLES, advance, finite_velocity, first_order_only, slope

Number = Array | float

#: Where a stage lies between t and s: evenly in the variable, evenly in its logarithm, or in t.
NODES = ("even", "geometric", "time")


@struct
class RungeKutta(Solver):
    """One explicit Runge-Kutta method. The step to the data is Euler's: one evaluation.

    Attributes:
      a: the rows of the tableau below the first, (a21,), (a31, a32), ...; None where it has a zero.
      b: the weights; None where zero.
      order: of the global error.
      variable: "t" or "sigma".
      nodes: where the stage c = sum of its row lies between t and s: "even" in the variable,
        "geometric" (the weighted geometric mean of its ends) or in "time".
    """

    a: tuple[tuple[Number | None, ...], ...]
    b: tuple[Number | None, ...]
    order: int = static()
    variable: str = static("t")
    nodes: str = static("even")

    @property
    def evaluations(self) -> int:
        """The number of stages."""
        return len(self.b)

    def check(self, schedule: PyTree, times: Array) -> None:
        """Refuses an infinite velocity in "t", and in "sigma" stages where leaves' sigma differ."""
        if self.variable == "t":
            finite_velocity("solver", schedule, times)
        several = len(jax.tree.leaves(schedule, is_leaf=is_schedule)) > 1
        inside = any(float(_node(row)) != 1.0 for row in self.a)
        if several and inside and self.variable == "sigma" and self.nodes != "time":
            raise UserError(
                "solver: variable='sigma' puts a stage at one sigma / alpha inside a step, and the "
                "leaves of x have schedules of their own. Use variable='t', or heun."
            )

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """x + (s - t) sum_i b_i d_i, d_i the slope at stage i."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        return self.complete(denoise, schedule, x, prediction, t, s, cond), memory, prediction

    def complete(
        self, denoise: Any, schedule: PyTree, x: PyTree, prediction: Prediction, t: Array,
        s: Array, cond: PyTree,
    ) -> PyTree:  # fmt: skip
        """The step's end, given the prediction at (x, t)."""
        d = slope(self.variable, schedule, prediction, t)

        def move(slopes: list[PyTree], weights: Sequence[Number | None], s: Array) -> PyTree:
            after = tuple(weights)[1:]
            return advance(self.variable, schedule, x, prediction, slopes, lambda _: after, t, s)

        def stages() -> PyTree:
            slopes = [d]
            for row in self.a:
                c = _node(row)
                u = self._time(schedule, t, s, c)
                y = move(slopes, [None if w is None else w / c for w in row], u)
                found = denoise(y, broadcast_time(u, x), cond)
                slopes.append(slope(self.variable, schedule, found, u))
            return move(slopes, self.b, s)

        euler = lambda: move([d], (1.0,), s)
        if not self.a:
            return euler()
        # A branch, not a select: the last step must not evaluate the denoiser at sigma = 0.
        return jax.lax.cond(first_order_only(self.variable, schedule, t, s), euler, stages)

    def _time(self, schedule: PyTree, t: Array, s: Array, c: Number) -> Array:
        """The time of the stage c."""

        def between(a: Array, b: Array) -> Array:
            return a ** (1.0 - c) * b**c if self.nodes == "geometric" else (1.0 - c) * a + c * b

        if self.variable == "t" or self.nodes == "time":
            u = between(t, s)
        else:
            sched = first(schedule)
            u = sched.time(-2.0 * jnp.log(between(sched.sigma_ratio(t), sched.sigma_ratio(s))))
        return jnp.where(c == 1.0, s, u).astype(t.dtype)


def runge_kutta(
    a: Sequence[Sequence[Number | None]], b: Sequence[Number | None], order: int,
    variable: str = "t", nodes: str = "even",
) -> RungeKutta:  # fmt: skip
    """Any explicit Runge-Kutta method by its tableau; see `RungeKutta` for the arguments.

    Kutta's third-order method is runge_kutta([[0.5], [-1, 2]], [1/6, 2/3, 1/6], order=3).

    Raises:
      UserError: an unknown variable or nodes, rows that are not strictly lower triangular, a stage
        at t itself, weights that do not sum to one.
    """
    choose("solver variable", variable, VARIABLES)
    choose("solver nodes", nodes, NODES)
    a, b = tuple(tuple(row) for row in a), tuple(b)
    for i, row in enumerate(a):
        if len(row) != i + 1:
            raise UserError(f"runge_kutta: a[{i}] has {len(row)} entries, {i + 1} are needed.")
        if is_concrete(row) and float(_node(row)) == 0:
            raise UserError(f"runge_kutta: a[{i}]={row} sums to 0; a later stage lies after t.")
    if len(b) != len(a) + 1:
        raise UserError(f"runge_kutta: b has {len(b)} entries for {len(a) + 1} stages.")
    if is_concrete(b) and not abs(float(_node(b)) - 1.0) < 1e-6:
        raise UserError(f"runge_kutta: b={b} sums to {float(_node(b)):.6g}; it must sum to 1.")
    return RungeKutta(a, b, order, variable, nodes)


def euler(variable: str = "t") -> RungeKutta:
    """Euler's method, order 1. In "sigma" it is DDIM (Song et al. 2021).

    Raises:
      UserError: an unknown variable.
    """
    return runge_kutta([], [1.0], 1, variable)


def heun(alpha: Number = 1.0, variable: str = "t", nodes: str = "even") -> RungeKutta:
    """The second-order methods with one parameter; alpha = 1 is Heun's, EDM's algorithm 1.

    Algorithm 3 of Karras et al. 2022: a second slope d' at t + alpha (s - t), then x + (s - t)
    ((1 - 1 / (2 alpha)) d + 1 / (2 alpha) d'). alpha = 1/2 is the midpoint rule, 2/3 Ralston's. Two
    evaluations a step; the step to the data is Euler's, so 2 n - 1 in all.

    Raises:
      UserError: alpha outside (0, 1], an unknown variable or nodes.
    """
    if is_concrete(alpha) and not 0 < alpha <= 1:
        raise UserError(f"heun: alpha={alpha} given; allowed are 0 < alpha <= 1.")
    half = 0.5 / alpha
    return runge_kutta([[alpha]], [1.0 - half, half], 2, variable, nodes)


def midpoint(variable: str = "t", nodes: str = "even") -> RungeKutta:
    """The midpoint rule, order 2, two evaluations a step.

    Raises:
      UserError: an unknown variable or nodes.
    """
    return heun(0.5, variable, nodes)


def dpm_2() -> RungeKutta:
    """k-diffusion's sample_dpm_2: the midpoint rule in sigma, its stage half-way in log sigma.

    The stage is where DPM-Solver-2 has it (Lu et al. 2022, 2206.00927), the weights are not.
    """
    return midpoint("sigma", "geometric")


def rk4(variable: str = "t", nodes: str = "even") -> RungeKutta:
    """The classical Runge-Kutta method, order 4, four evaluations a step.

    Raises:
      UserError: an unknown variable or nodes.
    """
    sixth, third = 1.0 / 6.0, 1.0 / 3.0
    a = [[0.5], [None, 0.5], [None, None, 1.0]]
    return runge_kutta(a, [sixth, third, third, sixth], 4, variable, nodes)


def heun_update(
    denoise: Any, schedule: PyTree, x: PyTree, t: Array, s: Array, cond: PyTree
) -> tuple[PyTree, Prediction]:
    """One Heun step in t from t to s, and the prediction at (x, t)."""
    x_next, _, prediction = heun().step(denoise, schedule, x, (), t, s, None, cond)
    return x_next, prediction


def _node(row: Sequence[Number | None]) -> Number:
    """The sum of a row: c, the share of the step at which its stage lies."""
    return sum(w for w in row if w is not None)
