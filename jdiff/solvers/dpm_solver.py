"""DPM-Solver (Lu et al. 2022, 2206.00927): exponential integrators in the predicted eps."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.solvers import phi
from jdiff.solvers.base import Solver
from jdiff.solvers.exponential import DDIM, ddim_update
from jdiff.solvers.multistep import Multistep
from jdiff.solvers.singlestep import TwoStage, has_inside, inner_time, refined


@struct
class DPMSolver2(TwoStage):
    """Order 2, two evaluations a step."""

    of: ClassVar[str] = "eps"

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """Algorithm 4 (algorithm 1 for r1 = 1/2): eps at the middle of the step."""
        return phi.midpoint(z, nodes)


@struct
class DPMSolver3(Solver):
    """Order 3, three evaluations a step."""

    r1: Array | float = 1 / 3
    r2: Array | float = 2 / 3

    order: ClassVar[int] = 3
    evaluations: ClassVar[int] = 3

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 5 (algorithm 2 for r1, r2 = 1/3, 2/3)."""
        start = denoise(x, broadcast_time(t, x), cond)

        def three_stages() -> PyTree:
            t1, t2 = (inner_time(schedule, t, s, r) for r in (self.r1, self.r2))
            one = denoise(ddim_update(schedule, start, t1), broadcast_time(t1, x), cond)
            u2 = refined(schedule, phi.adams, "eps", start, one, t, t1, t2)
            two = denoise(u2, broadcast_time(t2, x), cond)
            return refined(schedule, phi.adams, "eps", start, two, t, t2, s)

        inside = has_inside(schedule, t, s)
        return (
            jax.lax.cond(inside, three_stages, lambda: ddim_update(schedule, start, s)),
            memory,
            start,
        )


@struct
class DPMSolverFast(Solver):
    """Steps of order 3, and the last ones of order 2 or 1 so that the evaluations come out even."""

    nfe: int | None = static(None)

    order: ClassVar[int] = 3
    evaluations: ClassVar[int] = 3

    def check(self, schedule: PyTree, times: Array) -> None:
        """The grid has the number of steps that the evaluations need."""
        steps = len(times) - 1
        if self.nfe is not None and steps != self.nfe // 3 + 1:
            raise UserError(
                f"dpm_solver_fast: nfe={self.nfe} given for a grid of {steps} steps; it takes "
                f"{self.nfe // 3 + 1} steps."
            )

    def count(self, steps: int) -> int:
        """The last step ends at the data: one evaluation, of whatever order it would have been."""
        return sum(min(self._left_order(left), 3) for left in range(2, steps + 1)) + 1

    def init(self, x: PyTree, times: Array) -> Array:
        """The number of steps left."""
        return jnp.asarray(len(times) - 1)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Array, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Array, Prediction]:  # fmt: skip
        """The order depends on the number of steps left."""
        last = jnp.asarray([self._left_order(left) for left in (1, 2, 3)])
        order = last[jnp.clip(memory, 1, 3) - 1]
        steps = [
            lambda solver=solver: solver.step(denoise, schedule, x, (), t, s, noise, cond)[::2]
            for solver in (DDIM(), DPMSolver2(), DPMSolver3())
        ]
        x_next, prediction = jax.lax.switch(order - 1, steps)
        return x_next, memory - 1, prediction

    def _left_order(self, left: int) -> int:
        rest = (self.nfe or 0) % 3
        return min(left, 3) if rest == 0 else (rest if left == 1 else 3)


@struct
class DPMSolver2M(Multistep):
    """Order 2, one evaluation a step."""

    order: ClassVar[int] = 2
    of: ClassVar[str] = "eps"

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """eps at the middle of the step, extrapolated from the step before."""
        return phi.midpoint(z, nodes)


def dpm_solver(
    order: int = 3, r1: Array | float | None = None, r2: Array | float | None = None
) -> Solver:
    """DPM-Solver-1, -2 or -3 (2206.00927, algorithms 1, 2, 4, 5): as many evaluations a step.

    Args:
      order: 1 (DDIM), 2 or 3.
      r1: where in the step, in log SNR, the second evaluation lies: 1/2 for order 2, 1/3 for 3.
      r2: where the third lies: 2/3.

    Raises:
      UserError: another order, a stage that the order does not have, or stages outside 0 < r1 <= 1
        and r1 < r2 <= 1.
    """
    if order not in (1, 2, 3):
        raise UserError(f"dpm_solver: order={order} given; allowed are 1, 2, 3.")
    for name, value, least in (("r1", r1, 2), ("r2", r2, 3)):
        if value is not None and order < least:
            raise UserError(f"dpm_solver: {name}={value} given; order {order} has no such stage.")
        if isinstance(value, int | float) and not 0 < value <= 1:
            raise UserError(f"dpm_solver: {name}={value} given; it lies in (0, 1].")
    if order == 1:
        return DDIM()
    if order == 2:
        return DPMSolver2(0.5 if r1 is None else r1)
    r1, r2 = 1 / 3 if r1 is None else r1, 2 / 3 if r2 is None else r2
    if isinstance(r1, int | float) and isinstance(r2, int | float) and not r1 < r2:
        raise UserError(f"dpm_solver: r1={r1} and r2={r2} given; r1 must be below r2.")
    return DPMSolver3(r1, r2)


def dpm_solver_fast(nfe: int | None = None) -> DPMSolverFast:
    """DPM-Solver-fast (2206.00927): order 3, with 2 or 1 at the last steps.

    Meant for a grid even in log SNR (`grids.uniform_logsnr`). With the step to sigma = 0 last, of
    order 1 in any case, n steps take 3 n - 3 evaluations. A last step of order 1 that ends above
    the data makes the whole of order 2.

    Args:
      nfe: the evaluations, for a grid of nfe // 3 + 1 steps that ends above the data; 3 n - 3 for n
        steps unless given.

    Raises:
      UserError: fewer than one evaluation; at `sample`, a grid of another length.
    """
    if nfe is not None and nfe < 1:
        raise UserError(f"dpm_solver_fast: nfe={nfe} given; at least 1 is needed.")
    return DPMSolverFast(nfe)


def dpm_solver_2m() -> DPMSolver2M:
    """DPM-Solver as a multistep method, order 2 with one evaluation a step.

    diffusers' algorithm_type "dpmsolver" with "midpoint"; with "heun" it is `deis(2)`.
    """
    return DPMSolver2M()
