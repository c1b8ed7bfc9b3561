"""A learned monotone schedule: the logSNR is a small network of t (VDM)."""

import math

import jax
import jax.numpy as jnp

from jdiff.pytree import Array, struct
from jdiff.schedules.base import Schedule, ordered, real


@struct
class Monotone(Schedule):
    """logSNR a falling network of t, between learned ends at t = 0 and 1 (Kingma et al. 2021, H).

    With positive weights (softplus of the leaves),

        g(t) = a t + mean_j w_j sigmoid(k_j t + b_j)
        logsnr(t) = logsnr_max - (logsnr_max - logsnr_min) (g(t) - g(0)) / (g(1) - g(0))

    Variance preserving. Every leaf can be trained; the data lies at t = -inf.
    """

    logsnr_min: Array  # []
    logsnr_max: Array  # []
    slope: Array  # [] softplus gives a
    weights: Array  # [H] softplus gives w
    scales: Array  # [H] softplus gives k
    biases: Array  # [H] b

    t_min, t_max, t_data = 0.0, 1.0, -math.inf

    def _g(self, t: Array) -> Array:
        k, w = jax.nn.softplus(self.scales), jax.nn.softplus(self.weights)
        bumps = jnp.mean(w * jax.nn.sigmoid(k * t[..., None] + self.biases), axis=-1)
        return jax.nn.softplus(self.slope) * t + bumps

    def logsnr(self, t: Array) -> Array:
        """logsnr_max at 0, logsnr_min at 1, falling."""
        t = real(t)
        low, high = self._g(jnp.zeros((), t.dtype)), self._g(jnp.ones((), t.dtype))
        rise = (self._g(t) - low) / (high - low)
        return self.logsnr_max - (self.logsnr_max - self.logsnr_min) * rise

    def time(self, logsnr: Array) -> Array:
        """The root of logsnr(t): bisection, then a step of Newton, which carries the gradient."""
        logsnr = real(logsnr)
        frozen, wanted = jax.lax.stop_gradient((self, logsnr))
        root = frozen._bisect(wanted)
        known = jnp.isfinite(root)
        t = jnp.where(known, root, 0.0)
        value, slope = jax.jvp(frozen.logsnr, (t,), (jnp.ones_like(t),))
        # Value: a last correction. Gradient: dt = (d logsnr - d theta d logsnr / d theta) / slope.
        newton = t + (jnp.where(known, logsnr, value) - self.logsnr(t)) / slope
        return jnp.where(known, newton, root)

    def _bisect(self, logsnr: Array) -> Array:
        """The root, to the last digits; g - a t lies in [0, mean w], which brackets it."""
        low, high = self._g(jnp.zeros((), logsnr.dtype)), self._g(jnp.ones((), logsnr.dtype))
        rise = (self.logsnr_max - logsnr) / (self.logsnr_max - self.logsnr_min)
        g, a = low + rise * (high - low), jax.nn.softplus(self.slope)
        above = g / a
        below = above - jnp.mean(jax.nn.softplus(self.weights)) / a

        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            left, right = bracket
            middle = 0.5 * (left + right)
            before = self._g(middle) < g
            return jnp.where(before, middle, left), jnp.where(before, right, middle)

        steps = jnp.finfo(logsnr.dtype).nmant + 4
        left, right = jax.lax.fori_loop(0, steps, halve, (below, above))
        return 0.5 * (left + right)


def monotone(
    key: Array, logsnr_min: float = -5.0, logsnr_max: float = 13.3, hidden: int = 1024
) -> Monotone:
    """A learnable schedule, drawn near `linear_logsnr` (Kingma et al. 2021, VDM, appendix H).

    Its leaves are parameters: optimise them by the gradient of the loss, which for the
    diffusion part of the variational bound depends on the ends alone, so that the rest is trained
    to lower its variance. `time` is differentiable in all of them.

    Args:
      key: a PRNG key.
      logsnr_min, logsnr_max: the learned ends to start from; VDM's gamma is our -logsnr.
      hidden: the width of the network.

    Raises:
      UserError: logsnr_min is not below logsnr_max.
    """
    ordered("monotone", "logsnr_min", logsnr_min, "logsnr_max", logsnr_max)
    dtype, draw = jnp.result_type(float), jnp.float32  # the same schedule in either precision
    for_weights, for_centres = jax.random.split(key)
    inverse_softplus = lambda y: math.log(math.expm1(y))
    steepness = 8.0
    return Monotone(
        logsnr_min=jnp.asarray(logsnr_min, dtype),
        logsnr_max=jnp.asarray(logsnr_max, dtype),
        slope=jnp.asarray(inverse_softplus(1.0), dtype),
        weights=jax.random.normal(for_weights, (hidden,), draw).astype(dtype),
        scales=jnp.full((hidden,), inverse_softplus(steepness), dtype),
        biases=-steepness * jax.random.uniform(for_centres, (hidden,), draw).astype(dtype),
    )
