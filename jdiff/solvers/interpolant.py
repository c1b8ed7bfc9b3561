"""Euler-Maruyama on the SDE of a stochastic interpolant or a Schroedinger bridge."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.denoisers import Network
from jdiff.errors import UserError, not_negative
from jdiff.interpolants import Interpolant
from jdiff.noise import Noise
from jdiff.predictions import Prediction, endpoint_velocity
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.solvers.base import Solver, ends_at_data


@struct
class InterpolantSDE(Solver):
    """dx = (b - e score) dt + sqrt(2 e) dw, backwards in t."""

    latent: Network
    path: Interpolant
    diffusion: Array | float

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """x + (s - t) (b - e score) + sqrt(2 e (t - s)) z; to the data, E[x0 | x_t]."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        b = endpoint_velocity(schedule, prediction, t)
        eta = self.latent.output(x, t, {} if cond is None else cond)
        gamma, _ = self.path.gamma(t)
        # At an end without latent noise (t = 1) the score is not known from eta: the ODE's step.
        e = jnp.where(gamma == 0, 0.0, self.diffusion)
        score, z = self.path.score(eta, t), noise.between(x, t, s)
        last, x0 = ends_at_data(schedule, s), self.path.data(x, b, eta, t)

        def update(x: Array, b: Array, score: Array, z: Array, x0: Array) -> Array:
            moved = x + (s - t) * (b - e * score) + jnp.sqrt(2.0 * e * (t - s)) * z
            return jnp.where(last, x0, moved)

        return jax.tree.map(update, x, b, score, z, x0), memory, prediction


def interpolant_sde(
    latent: Network, path: Interpolant, diffusion: Array | float
) -> InterpolantSDE:  # fmt: skip
    """The SDE of a path between two endpoints, for any diffusion (see `jdiff.interpolants`).

    The denoiser that `sample` is given is the network of the velocity b, trained by
    `losses.conditional_flow`; x= is the other endpoint, times fall from 1.

    Args:
      latent: the network of E[z | x_t], trained by `losses.latent_noise`.
      path: the one that both were trained on.
      diffusion: e >= 0; scale^2 / 2 is the Schroedinger bridge's own, 0 the ODE.

    Raises:
      UserError: a path without latent noise, or a negative diffusion.
    """
    if path.level is None:
        raise UserError("interpolant_sde: path has no latent noise, hence no score; use an ODE.")
    not_negative("interpolant_sde", diffusion=diffusion)
    return InterpolantSDE(latent, path, diffusion)
