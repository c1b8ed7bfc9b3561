"""What a solver does, found by asking it."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.noise import Noise
from jdiff.predictions import from_x0
from jdiff.pytree import Array, PyTree, struct
from jdiff.schedules import is_schedule
from jdiff.solvers.base import Solver


@struct
class Constant(Noise):
    """Every draw is one number: 0 for a solver whose noise weighs nothing."""

    value: float

    def at(self, keys: Array, step: Array | int) -> "Constant":
        """Itself."""
        return self

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """The number, in x's shapes."""
        return jax.tree.map(lambda a: jnp.full_like(a, self.value), x)

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """The number, in x's shapes."""
        return jax.tree.map(lambda a: jnp.full_like(a, self.value), x)


def draws_noise(solver: Solver, schedule: PyTree, times: Array) -> bool:
    """Whether what the solver makes over this grid depends on the noise it is given.

    Not whether it asks for noise: ddim(eta=0) and edm(churn=0) do, and do not use it. Found by
    running it on one number with two different noises.
    """
    quiet, loud = (_run(solver, schedule, times, Constant(z)) for z in (0.0, 1.0))
    pairs = zip(jax.tree.leaves(quiet), jax.tree.leaves(loud))
    return not all(jnp.array_equal(a, b, equal_nan=True) for a, b in pairs)


@jax.jit
def _run(solver: Solver, schedule: PyTree, times: Array, noise: Noise) -> PyTree:
    x = jax.tree.map(lambda _: jnp.ones((1, 1)), schedule, is_leaf=is_schedule)

    def denoise(x: PyTree, t: Array, cond: Any) -> Any:
        return from_x0(schedule, x, jax.tree.map(lambda a: 0.5 * a, x), t)

    def body(carry: tuple, ends: Array) -> tuple:
        x, memory = carry
        new, memory, _ = solver.step(denoise, schedule, x, memory, *ends, noise, {})
        return (jax.tree.map(lambda a, old: a.astype(old.dtype), new, x), memory), new

    start = (x, solver.init(x, times))
    return jax.lax.scan(body, start, jnp.stack([times[:-1], times[1:]], 1))[1]
