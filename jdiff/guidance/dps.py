"""Diffusion posterior sampling, DPS (Chung et al. 2022, 2209.14687): any smooth operator."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.measured import Measured, add_score
from jdiff.operators import as_operator, residual
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct


@struct
class DPS(Measured):
    """The guided denoiser that `dps` makes."""

    denoiser: Any
    operator: Any
    scale: Array | float
    noise: Array | float | None
    entry: str = static()

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]`, cond with y -> guided prediction: one call and its gradient."""
        t = broadcast_time(t, x)
        y, rest = self.read(cond)

        def log_likelihood(x: PyTree) -> tuple[Array, Prediction]:
            prediction = self.denoiser(x, t, rest)
            square = sum(
                jnp.sum(jnp.square(r), axis=tuple(range(1, r.ndim)))
                for r in jax.tree.leaves(residual(self.operator, y, prediction.x0))
            )
            if self.noise is not None:
                return -jnp.sum(square) / (2 * self.noise**2), prediction
            positive = jnp.where(square > 0, square, 1.0)  # the norm has no gradient at 0
            return -jnp.sum(jnp.where(square > 0, jnp.sqrt(positive), 0.0)), prediction

        g, prediction = jax.grad(log_likelihood, has_aux=True)(x)
        return add_score(schedule_of(self.denoiser), prediction, g, t, self.scale)


def dps(
    denoise: Any, operator: Any, scale: Array | float = 1.0, noise: Array | float | None = None,
    entry: str = "y",
) -> DPS:  # fmt: skip
    """The score gains scale times the gradient of log p(y | x0(x_t)), through the denoiser.

    With `noise`, the standard deviation of y's noise: -||y - A(x0)||^2 / (2 noise^2),
    which takes x0(x_t) for x0 and so is too sure where much noise is left. Without: -||y - A(x0)||,
    the step that the paper's algorithm 1 takes with zeta = zeta' / ||y - A(x0)||; it moves x0 by
    at most the same length whatever the residual. The paper's zeta' is added to the state a step,
    so depends on the grid; `scale` multiplies a score and does not.

    Args:
      denoise: a denoiser with a schedule, differentiable in x.
      operator: x0 `[B, ...]` -> y, from `jdiff.operators` or any differentiable function.
      entry: of cond, where y `[B, ...]` is found.

    Raises:
      UserError: noise that is not positive, no schedule; at the call, no y or of another shape.
    """
    if isinstance(noise, int | float) and not noise > 0:
        raise UserError(f"dps: noise={noise} given; it is positive, or None for the norm.")
    denoise, operator = as_denoiser(denoise), as_operator(operator)
    schedule_of(denoise, where="dps")
    return DPS(denoise, operator, scale, noise, entry)
