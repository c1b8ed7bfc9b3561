"""DDNM+ (Wang et al. 2022, 2212.00490): linear measurements with noise."""

from typing import Any, ClassVar

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.operators import as_operator, measurement, residual
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import first
from jdiff.solvers.base import Solver
from jdiff.solvers.exponential import posterior_std


@struct
class DDNMPlus(Solver):
    """The solver that `ddnm` makes."""

    operator: Any
    noise: Array | float
    entry: str = static()

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: Array, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[Array, Any, Prediction]:  # fmt: skip
        """DDPM's step from the projected x0, its noise less what y brings."""
        y, rest = measurement(cond, self.entry)
        prediction = denoise(x, broadcast_time(t, x), rest)
        sched = first(schedule)
        # The posterior's mean is a x0 + b x.
        share = -jnp.expm1(sched.logsnr(t) - sched.logsnr(s))
        a, std = sched.alpha(s) * share, posterior_std(sched, t, s)
        b = sched.alpha(t) * sched.sigma(s) ** 2 / (sched.alpha(s) * sched.sigma(t) ** 2)

        def trust(singular: Array) -> Array:
            """lambda: how far x0 is drawn to y, so that y's noise fits into the step's."""
            whole = std * singular >= a * self.noise
            return jnp.where(whole, 1.0, std * singular / jnp.where(whole, 1.0, a * self.noise))

        def spread(singular: Array) -> Array:
            """sqrt(gamma): the noise that is still to be added."""
            measured = singular > 0
            brought = a * self.noise / jnp.where(measured, singular, 1.0)
            brought = jnp.where(measured, jnp.minimum(brought, std), 0.0)
            return jnp.sqrt(jnp.maximum(std**2 - brought**2, 0.0))

        correction = self.operator.pinv(residual(self.operator, y, prediction.x0))
        x0 = prediction.x0 + self.operator.filter(correction, trust)
        z = self.operator.filter(noise.between(x, t, s), spread)
        return a * x0 + b * x + z, memory, prediction


def ddnm(operator: Any, noise: Array | float = 0.0, entry: str = "y") -> DDNMPlus:
    """DDPM's sampler, its x0 projected onto the measurements as far as their noise allows.

    With noise = 0 it is `ddpm` with `guidance.ddnm`. With noise, x_s has the noise level of its
    time: what y brings along a singular direction is taken off the noise that is added. y is read
    from `cond[entry]`. For x of one array.

    Args:
      operator: a linear one from `jdiff.operators` whose singular values are known.
      noise: the standard deviation of y's noise.

    Raises:
      UserError: negative noise, or an operator without singular values.
    """
    operator = as_operator(operator)
    if isinstance(noise, int | float) and noise < 0:
        raise UserError(f"ddnm: noise={noise} given; it is not negative.")
    if not hasattr(operator, "filter"):
        raise UserError("ddnm: a linear operator from jdiff.operators is needed.")
    return DDNMPlus(operator, noise, entry)
