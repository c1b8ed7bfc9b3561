"""Learned variances: iDDPM's hybrid loss (Nichol and Dhariwal 2021, 2102.09672).

    L_hybrid = L_simple + lambda L_vlb                                              (equation 16)

L_vlb is the variational bound of the discrete chain, with the reverse step's variance read from the
network (equation 15) and its mean held fixed: the bound teaches the variance alone.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jdiff.denoisers import Network
from jdiff.distributions import Uniform
from jdiff.errors import UserError
from jdiff.losses.denoising import Distribution, Weighting, normal, output_error
from jdiff.predictions import Prediction, corrupt
from jdiff.pytree import Array, PyTree, batch_size, expand
from jdiff.schedules import Schedule, first, schedule_map


def hybrid(
    key: Array, denoiser: Network, x0: PyTree, cond: PyTree = None, *, weight: float = 1e-3,
    distribution: Distribution | None = None, weighting: Weighting | None = None,
    eps: PyTree = None, dropout_key: Array | None = None, levels: int = 256,
) -> Array:  # fmt: skip
    """L_simple + weight T L_t, one step's share of the bound in bits a dimension.

    With uniform steps T L_t is an unbiased estimate of L_vlb (but for the prior's term, which
    nothing is learned from). As in the published code, the bound counts in bits.

    Args:
      key: the key of the times and the noise.
      denoiser: a network of twice the image's channels, parameterization variance="learned_range",
        on a discrete schedule.
      x0: clean data in [-1, 1], a tree of `[B, ...]`.
      cond: conditions for the network, `[B, ...]`.
      weight: lambda.
      distribution: of the steps; uniform over 1..T unless given.
      weighting: of the simple part, as in `denoising`.
      eps: the noise, like x0; drawn unless given.
      dropout_key: switches the network's dropout on.
      levels: values that a pixel of the data can take, evenly spaced in [-1, 1].

    Returns:
      `[B]` losses; with trees, the mean over all dimensions of all leaves.

    Raises:
      UserError: a schedule without steps, or a network that learns no variance.
    """
    schedule, row = denoiser.schedule, denoiser.parameterization
    if row.variance == "fixed":
        raise UserError(
            "hybrid: the network learns no variance; give its parameterization "
            "variance='learned_range' and twice the image's channels."
        )
    key_t, key_eps = jax.random.split(key)
    t = (distribution or Uniform())(key_t, batch_size(x0), first(schedule))
    eps = normal(key_eps, x0) if eps is None else eps
    x = corrupt(schedule, x0, eps, t)
    output = denoiser.output(x, t, {} if cond is None else cond, dropout_key)
    simple = output_error(denoiser, row.split(output)[0], x0, eps, t, weighting)
    prediction = row.prediction(schedule, output, x, t)
    held = prediction._replace(x0=jax.lax.stop_gradient(prediction.x0))
    bound = bound_term(schedule, held, x0, t, levels)
    return simple + weight * first(schedule).T * bound


def bound_term(
    schedule: PyTree, prediction: Prediction, x0: PyTree, t: Array, levels: int = 256
) -> Array:
    """The share of step t in the variational bound, in bits a dimension `[B]`.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), both normal; for t = 1, -log p(x0 | x_1) of the
    pixel's interval of width 2 / (levels - 1) under the normal with mean x0_hat, the outermost
    intervals reaching to infinity (Ho et al. 2020, equation 13).

    Args:
      schedule: discrete, or a tree of discrete schedules.
      prediction: at x_t; its `variance` is the share of the way in log from the posterior's
        variance to beta_t, 0 if None. At t = 1 the posterior's is 0, and that of t = 2 stands for
        it, as in the published code.
      x0: the clean data in [-1, 1].
      t: steps in 1..T, `[B]`.
      levels: see `hybrid`.

    Raises:
      UserError: a schedule without steps.
    """
    variance = prediction.variance
    if variance is None:
        variance = jax.tree.map(jnp.zeros_like, prediction.x0)

    def bits(s: Schedule, x0: Array, x0_hat: Array, share: Array) -> tuple[Array, int]:
        if s.T is None:
            raise UserError(
                f"bound_term: the schedule {type(s).__name__} has no steps, which the discrete "
                "bound needs; give a discrete one, e.g. schedules.ddpm_linear()."
            )
        log_small, log_large, gain = (expand(a, x0) for a in _step(s, t))
        log_model = share * log_large + (1.0 - share) * log_small
        gap = x0 - x0_hat
        kl = _normal_kl(gain * gap, log_small, log_model)
        first_step = expand(t, x0) <= 1.0
        # The decoder of the other steps is not used; 0 keeps its far tails out of the gradient.
        decoder = -_log_pixel(x0, jnp.where(first_step, gap, 0.0), 0.5 * log_model, levels)
        nats = jnp.where(first_step, decoder, kl).reshape(len(x0), -1)
        return nats.sum(1) / jnp.log(2.0), nats.shape[1]

    terms = schedule_map(bits, schedule, x0, prediction.x0, variance)
    sums, sizes = zip(*jax.tree.leaves(terms, is_leaf=lambda p: isinstance(p, tuple)))
    return sum(sums) / sum(sizes)


def _step(s: Schedule, t: Array) -> tuple[Array, Array, Array]:
    """log of the posterior's variance and of beta_t, and the posterior mean's coefficient of x0."""
    fraction = lambda t: -jnp.expm1(s.logsnr(t) - s.logsnr(t - 1.0))  # beta_t / (1 - abar_t)
    second = jnp.maximum(t, 2.0)
    log_small = 2.0 * jnp.log(s.sigma(second - 1.0)) + jnp.log(fraction(second))
    log_large = 2.0 * jnp.log(s.sigma(t)) + jnp.log(fraction(t))
    return log_small, log_large, s.alpha(t - 1.0) * fraction(t)


def _normal_kl(gap: Array, log_true: Array, log_model: Array) -> Array:
    """KL(N(m, exp(log_true)) || N(m + gap, exp(log_model))), in nats."""
    ratio = log_true - log_model
    return 0.5 * (jnp.exp(ratio) - 1.0 - ratio + jnp.square(gap) * jnp.exp(-log_model))


def _log_pixel(x: Array, gap: Array, log_std: Array, levels: int) -> Array:
    """log of the normal's mass on the interval of the pixel x, at distance gap from the mean."""
    half, scale = 1.0 / (levels - 1), jnp.exp(-log_std)
    lower, upper = (gap - half) * scale, (gap + half) * scale
    # Mirrored to the left tail, where log_ndtr keeps its digits.
    a, b = jnp.where(gap > 0, -upper, lower), jnp.where(gap > 0, -lower, upper)
    log_b = log_ndtr(b)
    inner = log_b + jnp.log(-jnp.expm1(jnp.minimum(log_ndtr(a) - log_b, -1e-12)))
    edge = 1.0 - half
    return jnp.where(x > edge, log_ndtr(-lower), jnp.where(x < -edge, log_ndtr(upper), inner))
