"""Loss weightings: (schedule, t) -> `[B]`, the weight of the squared error in x0.

One space for all: a weighting says how much an error in the predicted image counts at each noise
level, whatever the network predicts. With SNR = alpha^2 / sigma^2 and L = log SNR, an error e in x0
is an error -alpha e / sigma in eps, so DDPM's unweighted eps loss is `eps()` for every
parameterisation. The weight of the network's own output is `None` in `losses.denoising`.

    name            weight in x0                       in the space of the paper
    x0              1
    eps             SNR                                1 on eps
    v               (det / sigma)^2                    1 on v: SNR + 1 where alpha^2 + sigma^2 = 1
    velocity        (det / sigma)^2                    1 on dx/dt
    edm             (sigma^2 + s^2) / (sigma s)^2      1 on F, sigma standing for sigma / alpha
    truncated_snr   max(SNR, 1)
    min_snr         min(SNR, g)                        min(SNR, g) / SNR on eps
    soft_min_snr    SNR g / (SNR + g)                  g / (SNR + g) on eps
    p2              SNR / (k + SNR)^g                  1 / (k + SNR)^g on eps
    elbo            -(1/2) dSNR/dt (t_max - t_min)     -(1/2) dL/dt on eps, g^2 / 2 on the score
    sigmoid         elbo sigmoid(b - L)                -(1/2) dL/dt e^b sigmoid(L - b) on x0
    sd3             velocity pi(t) (t_max - t_min)     pi(t) on dx/dt

A weight counts under the times that are drawn: the same weighting under two distributions is two
losses. `importance` divides the one distribution out and the other in.
"""

import jax
import jax.numpy as jnp

from jdiff import distributions
from jdiff.distributions import Unit
from jdiff.errors import UserError, positive
from jdiff.predictions import Parameterization, parameterization
from jdiff.pytree import Array, PyTree, struct
from jdiff.schedules import Schedule


@struct
class Space:
    """The unweighted loss of one parameterisation: weight (det / sigma)^2."""

    of: Parameterization

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return jnp.square(self.of.determinant(schedule, t) / schedule.sigma(t))


@struct
class TruncatedSNR:
    """max(SNR, 1)."""

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return jnp.exp(jnp.maximum(schedule.logsnr(t), 0.0))


@struct
class MinSNR:
    """min(SNR, gamma) (Hang et al. 2023)."""

    gamma: Array | float = 5.0

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return jnp.exp(jnp.minimum(schedule.logsnr(t), jnp.log(self.gamma)))


@struct
class SoftMinSNR:
    """1 / (1 / SNR + 1 / gamma)."""

    gamma: Array | float = 4.0

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return self.gamma * jax.nn.sigmoid(schedule.logsnr(t) - jnp.log(self.gamma))


@struct
class P2:
    """SNR / (k + SNR)^gamma."""

    gamma: Array | float = 1.0
    k: Array | float = 1.0

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        logsnr = schedule.logsnr(t)
        return jnp.exp(logsnr - self.gamma * jnp.logaddexp(jnp.log(self.k), logsnr))


@struct
class ELBO:
    """The variational bound's weight for uniform times."""

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        if schedule.T is None:
            logsnr, slope = _logsnr(schedule, t)
            return -0.5 * jnp.exp(logsnr) * slope * (schedule.t_max - schedule.t_min)
        # T/2 (SNR(t - 1) - SNR(t)); before the first step there is the decoder instead.
        logsnr = schedule.logsnr(t)
        previous = schedule.logsnr(jnp.maximum(t - 1.0, 1.0))
        drop = -jnp.exp(previous) * jnp.expm1(logsnr - previous)
        return 0.5 * schedule.T * jnp.where(t > 1.0, drop, jnp.exp(logsnr))


@struct
class Sigmoid:
    """The bound's weight times sigmoid(bias - logSNR)."""

    bias: Array | float = -3.0

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t."""
        return ELBO()(schedule, t) * jax.nn.sigmoid(self.bias - schedule.logsnr(t))


@struct
class Importance:
    """A weighting meant for times of one distribution, under times drawn from another."""

    weighting: PyTree
    drawn: PyTree
    meant: PyTree

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        """The weight at times t, 0 where the distribution that it is meant for is 0."""
        if schedule.T is not None:
            for name, law in (("distribution", self.drawn), ("meant", self.meant)):
                if not isinstance(law, Unit):
                    raise UserError(
                        f"importance: {name} is {type(law).__name__}, whose times lie between the "
                        "steps of a discrete schedule; give one on the unit interval, e.g. uniform."
                    )
        meant = self.meant.density(schedule, t)
        ratio = meant / self.drawn.density(schedule, t)
        return jnp.where(meant > 0, self.weighting(schedule, t) * ratio, 0.0)


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


def truncated_snr() -> TruncatedSNR:
    """max(SNR, 1): the larger of the x0 and the eps loss (Salimans and Ho 2022, section 4)."""
    return TruncatedSNR()


def min_snr(gamma: float = 5.0) -> MinSNR:
    """min(SNR, gamma) on the x0 loss.

    Raises:
      UserError: gamma is not positive.
    """
    positive("min_snr", gamma=gamma)
    return MinSNR(gamma)


def soft_min_snr(gamma: float = 4.0) -> SoftMinSNR:
    """SNR gamma / (SNR + gamma) (Crowson et al. 2024, HDiT); gamma = 1 / sigma_data^2.

    Raises:
      UserError: gamma is not positive.
    """
    positive("soft_min_snr", gamma=gamma)
    return SoftMinSNR(gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> P2:
    """DDPM's eps loss over (k + SNR)^gamma (Choi et al. 2022, equation 8); gamma = 0 is `eps`.

    Raises:
      UserError: k is not positive.
    """
    positive("p2", k=k)
    return P2(gamma, k)


def elbo() -> ELBO:
    """-(1/2) dSNR/dt, the variational bound's diffusion part (Kingma et al. 2021, equation 17).

    With uniform times the loss's expectation is the integral over [t_min, t_max], in nats a
    dimension (the factor t_max - t_min is 1 over the density of the times); with the times of any
    other distribution, `importance(elbo(), distribution)` estimates the same integral. On a
    discrete table it is the sum of equation 13, and step 1 stands for the decoder
    N(x0_hat, 1 / SNR(1)), but for its constant.
    """
    return ELBO()


def likelihood() -> ELBO:
    """Song et al.'s (2021, 2101.09258, theorem 1) likelihood weighting, (1/2) g(t)^2 on the score.

    It is `elbo` in another space: g^2 = -sigma^2 d logSNR / dt for every schedule, and an error e
    in x0 is an error alpha e / sigma^2 in the score. What is said there of times holds here.
    """
    return ELBO()


def sigmoid(bias: float = -3.0) -> Sigmoid:
    """The bound weighted by sigmoid(bias - logSNR) (Kingma and Gao 2023; Hoogeboom et al. 2024).

    A weight that falls with the logSNR makes the loss a bound too, of noised data. SiD2 writes it
    e^bias sigmoid(logSNR - bias) d(-logSNR)/dt / 2 on x0, with -3 for 512 x 512 pixels, and less
    negative for fewer; VDM++'s bias is 2. Times as for `elbo`.
    """
    return Sigmoid(bias)


def sd3(distribution: Unit | None = None) -> Importance:
    """SD3's loss with pi(t) as a weight and uniform times (Esser et al. 2024, equation 18).

    w = t / (1 - t) pi(t) on -(1/2) d logSNR/dt ||eps - eps_hat||^2, which for the rectified flow is
    pi(t) ||u - u_hat||^2. In expectation the same as `velocity()` with times drawn from pi (which
    is how SD3 trains); this is for a sampler of times that is fixed by something else.

    Args:
      distribution: pi; logit_normal(0, 1), the paper's best, unless given.
    """
    pi = distributions.logit_normal() if distribution is None else distribution
    return importance(velocity(), distributions.uniform(), meant=pi)


def importance(weighting: PyTree, distribution: PyTree, meant: PyTree = None) -> Importance:
    """`weighting` divided by the density of the times drawn: the same integral from any times.

    E over t ~ `distribution` of the result is E over t ~ `meant` (uniform unless given) of
    `weighting`, as long as `distribution` covers the domain; times outside it get weight 0.

    Args:
      weighting: a weighting that is meant for times of `meant`.
      distribution: the one that draws the times, with a `density`.

    Raises:
      UserError: a distribution without a density.
    """
    meant = distributions.uniform() if meant is None else meant
    for name, law in (("distribution", distribution), ("meant", meant)):
        if not hasattr(law, "density"):
            raise UserError(
                f"importance: {name} has no density; give one of jdiff.distributions: "
                f"{', '.join(sorted(distributions.BY_NAME))}."
            )
    return Importance(weighting, distribution, meant)


#: Weightings by name, as configs give them.
BY_NAME = {
    "x0": x0, "eps": eps, "v": v, "velocity": velocity, "edm": edm, "truncated_snr": truncated_snr,
    "min_snr": min_snr, "soft_min_snr": soft_min_snr, "p2": p2, "elbo": elbo,
    "likelihood": likelihood, "sigmoid": sigmoid, "sd3": sd3,
}  # fmt: skip


def _logsnr(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """(logSNR, d logSNR / dt) at t."""
    t = jnp.asarray(t)
    return jax.jvp(schedule.logsnr, (t,), (jnp.ones_like(t),))
