"""Loss weightings: (schedule, t) -> `[B]`, the weight of the squared error in x0.

One space for all: a weighting says how much an error in the predicted image counts at each noise
level, whatever the network predicts. With SNR = alpha^2 / sigma^2, an error e in x0 is an error
-alpha e / sigma in eps, so DDPM's unweighted eps loss is `eps()` for every parameterisation.
The weight of the network's own output is `None` in `losses.denoising`.
"""

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.predictions import Parameterization, parameterization
from jdiff.pytree import Array, struct
from jdiff.schedules import Schedule


@struct
class Space:
    """The unweighted loss of one parameterisation: weight (det / sigma)^2."""

    of: Parameterization

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return jnp.square(self.of.determinant(schedule, t) / schedule.sigma(t))


@struct
class MinSNR:
    """min(SNR, gamma) (Hang et al. 2023)."""

    gamma: float = 5.0

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return jnp.exp(jnp.minimum(schedule.logsnr(t), jnp.log(self.gamma)))


def x0() -> Space:
    """||x0 - x0_hat||^2: weight 1."""
    return Space(parameterization("x0"))


def eps() -> Space:
    """||eps - eps_hat||^2, DDPM's L_simple: weight SNR."""
    return Space(parameterization("eps"))


def v() -> Space:
    """||v - v_hat||^2 (Salimans and Ho 2022): weight SNR + 1 where alpha^2 + sigma^2 = 1."""
    return Space(parameterization("v"))


def velocity() -> Space:
    """||u - u_hat||^2 of the velocity dx/dt: the flow-matching loss."""
    return Space(parameterization("velocity"))


def edm(sigma_data: float = 0.5) -> Space:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1)."""
    return Space(parameterization("edm", sigma_data=sigma_data))


def min_snr(gamma: float = 5.0) -> MinSNR:
    """min(SNR, gamma) on the x0 loss.

    Raises:
      UserError: gamma is not positive.
    """
    if isinstance(gamma, int | float) and not gamma > 0:
        raise UserError(f"min_snr: gamma={gamma} given; it must be positive.")
    return MinSNR(gamma)


#: Weightings by name, as configs give them.
BY_NAME = {"x0": x0, "eps": eps, "v": v, "velocity": velocity, "edm": edm, "min_snr": min_snr}
