"""Gradient-estimation sampling: denoising as approximate projection on the data.

Permenter and Yuan 2024 (2306.04848): near the data set K, sigma eps(x, sigma) approximates x minus
its projection, the gradient of half the squared distance to K; so a DDIM step is a step of gradient
descent on that distance, and sigma the estimate of the distance (over sqrt(dim)). The gradient of a
distance has the direction of x - proj(x) all along the way there, so the error of one estimate is
seen in the next: the two are combined, and the combination extrapolates.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, is_concrete, struct
from jdiff.solvers.base import Solver
from jdiff.solvers.variables import advance


@struct
class GradientEstimation(Solver):
    """DDIM along gamma eps_t + (1 - gamma) eps_before; gamma is the paper's."""

    gamma: Array | float

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def init(self, x: PyTree, times: Array) -> Any:
        """(the eps before, whether there is one)."""
        blank = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        return jax.tree.map(blank, x), jnp.asarray(False)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 2 of the paper in sigma / alpha; the first step is DDIM's."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        before, have = memory
        weights = lambda _: [jnp.where(have, 1.0 - self.gamma, 0.0)]
        eps = prediction.eps
        x_next = advance("sigma", schedule, x, prediction, [eps, before], weights, t, s)
        eps = jax.tree.map(lambda a, old: a.astype(old.dtype), eps, before)
        return x_next, (eps, jnp.asarray(True)), prediction


def gradient_estimation(gamma: Array | float = 2.0) -> GradientEstimation:
    """The gradient-estimation sampler (Permenter and Yuan 2024, algorithm 2).

    Args:
      gamma: 1 is DDIM; 2 is the paper's choice. Order 1 but for gamma = 1.5 on even steps in sigma,
        which is Adams and Bashforth's method of order 2. What it gains is at few steps.

    Raises:
      UserError: gamma is not positive.
    """
    if is_concrete(gamma) and not gamma > 0:
        raise UserError(f"gradient_estimation: gamma={gamma} given; it must be positive.")
    return GradientEstimation(gamma)
