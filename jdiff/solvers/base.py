"""The solver interface, and the two facts that every step needs."""

from typing import Any, ClassVar

import jax.numpy as jnp

from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree
from jdiff.schedules import first


class Solver:
    """One step of a sampler; see the package's docstring for the contract."""

    order: ClassVar[int]
    evaluations: ClassVar[int]

    def check(self, schedule: PyTree, times: Array) -> None:
        """Raises a UserError if the solver cannot serve this schedule or grid. Values are known."""

    def count(self, steps: int) -> int:
        """The denoiser calls of so many steps, the last of which ends at the data."""
        return (steps - 1) * self.evaluations + 1

    def init(self, x: PyTree, times: Array) -> Any:
        """What the solver remembers between steps, before the first."""
        return ()

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """From x at time t to the smaller time s, with the step's own `noise`."""
        raise NotImplementedError  # abstract


def ends_at_data(schedule: PyTree, s: Array) -> Array:
    """Whether time s is the data itself, sigma = 0: a scalar bool."""
    return first(schedule).sigma(s) == 0


def safe_ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
