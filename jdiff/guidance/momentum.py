"""Momentum of the guidance between steps: a solver that remembers (Sadat et al. 2024, 2410.02416).

A denoiser is a function of (x, t, cond) and remembers nothing; solvers do. So momentum is a solver
around a solver: it evaluates the pair, changes it by what it remembers, and hands the result on.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.guidance.base import refinable
from jdiff.noise import Noise
from jdiff.predictions import Prediction, from_x0
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.solvers.base import Solver


@struct
class Known:
    """A prediction in the place of a denoiser, for a solver that evaluates once, at (x, t)."""

    prediction: Prediction
    schedule: PyTree

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """The prediction."""
        return self.prediction


@struct
class Momentum(Solver):
    """The solver that `with_momentum` makes."""

    solver: Solver
    beta: Array | float

    evaluations: ClassVar[int] = 1

    @property
    def order(self) -> int:
        """That of the solver inside, for beta = 0."""
        return self.solver.order

    def check(self, schedule: PyTree, times: Array) -> None:
        """The inner solver's check."""
        self.solver.check(schedule, times)

    def count(self, steps: int) -> int:
        """The inner solver's count."""
        return self.solver.count(steps)

    def init(self, x: PyTree, times: Array) -> Any:
        """(inner memory, running difference in x0)."""
        blank = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        return self.solver.init(x, times), jax.tree.map(blank, x)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """The inner step with the pair's difference d replaced by d + beta (last difference)."""
        denoise = refinable("with_momentum", denoise)
        memory, last = memory
        times = broadcast_time(t, x)
        pair = denoise.pair(x, times, cond)

        def update(last: Array, good: Array, bad: Array) -> Array:
            return good.astype(last.dtype) - bad.astype(last.dtype) + self.beta * last

        average = jax.tree.map(update, last, pair.good.x0, pair.bad.x0)
        bad_x0 = jax.tree.map(lambda g, d: g.astype(d.dtype) - d, pair.good.x0, average)
        bad = from_x0(schedule, x, bad_x0, times)
        bad = pair.bad._replace(x0=bad.x0, eps=bad.eps)
        prediction = denoise.guide(x, times, pair._replace(bad=bad))
        known = Known(prediction, schedule)
        x, memory, prediction = self.solver.step(known, schedule, x, memory, t, s, noise, cond)
        return x, (memory, average), prediction


def with_momentum(solver: Solver, beta: Array | float = -0.5) -> Momentum:
    """A solver that guides with a running difference: d_i = (good - bad) + beta d_{i-1}, in x0.

    The denoiser it is given extrapolates a pair (cfg, apg(cfg(...)), ...): the momentum comes
    before its refinements, as in APG. Negative beta (the paper's -0.5 to -0.75) pushes away
    from what guidance did before. beta = 0 is the solver itself.

    Args:
      solver: one that evaluates the denoiser once a step, at (x, t): ddim, dpmpp_2m, euler, ddpm.

    Raises:
      UserError: a solver that evaluates more than once a step; at the step, a denoiser that does
        not extrapolate.
    """
    if solver.evaluations != 1:
        raise UserError(
            f"with_momentum: {type(solver).__name__} evaluates {solver.evaluations} times a step, "
            "and a difference is remembered once a step; give a solver that evaluates once, e.g. "
            "ddim() or dpmpp_2m()."
        )
    return Momentum(solver, beta)
