"""Convex paths, alpha + sigma = 1: rectified flow and its powers."""

import jax
import jax.numpy as jnp

from jdiff.errors import positive
from jdiff.pytree import Array, struct
from jdiff.schedules.base import Schedule, lost, real


@struct
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t on [0, 1]: straight paths (Liu et al. 2022; Lipman et al. 2023).

    t = 1 is noise, as in SD3 and MeanFlow; Lipman's, SiT's and JiT's t is our 1 - t.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Array) -> Array:
        """1 - t."""
        return 1.0 - real(t)

    def sigma(self, t: Array) -> Array:
        """t."""
        return real(t)

    def logsnr(self, t: Array) -> Array:
        """2 log((1 - t) / t)."""
        t = real(t)
        return 2.0 * (jnp.log1p(-t) - jnp.log(t))

    def time(self, logsnr: Array) -> Array:
        """1 / (1 + exp(logsnr / 2))."""
        return jax.nn.sigmoid(-0.5 * real(logsnr))

    def warp(self, t: Array, shift: Array) -> Array:
        """t / (t + shift (1 - t)): `shift_time` by 1 / shift."""
        t = real(t)
        return t / (t + shift * (1.0 - t))


@struct
class Polynomial(Schedule):
    """alpha = (1 - t)^n, sigma = 1 - (1 - t)^n on [0, 1]: the path of rectified flow, warped."""

    n: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Array) -> Array:
        """(1 - t)^n."""
        return (1.0 - real(t)) ** self.n

    def sigma(self, t: Array) -> Array:
        """1 - (1 - t)^n."""
        return lost(t, self.n)

    def logsnr(self, t: Array) -> Array:
        """2 log(alpha / (1 - alpha))."""
        return 2.0 * (self.n * jnp.log1p(-real(t)) - jnp.log(self.sigma(t)))

    def time(self, logsnr: Array) -> Array:
        """1 - sigmoid(logsnr / 2)^(1 / n)."""
        return -jnp.expm1(jax.nn.log_sigmoid(0.5 * real(logsnr)) / self.n)

    def warp(self, t: Array, shift: Array) -> Array:
        """t + (1 - t) (1 - (1 + (1 / shift - 1) sigma)^(-1 / n)), smooth at t = 1."""
        t = real(t)
        gain = -jnp.log1p((1.0 / shift - 1.0) * self.sigma(t)) / self.n
        return t - (1.0 - t) * jnp.expm1(gain)


def rectified_flow() -> RectifiedFlow:
    """Straight paths between data (t = 0) and noise (t = 1)."""
    return RectifiedFlow()


def polynomial(n: float = 2.0) -> Polynomial:
    """Straight paths travelled at a polynomial pace, alpha = (1 - t)^n (Lipman et al. 2024).

    The polynomial convex schedule of the flow_matching library, whose t is our 1 - t. n = 1 is
    rectified flow.

    Raises:
      UserError: n is not positive.
    """
    positive("polynomial", n=n)
    return Polynomial(n)
