"""DPM-Solver++ on the reverse SDE (Lu et al. 2022, 2211.01095, section 5), with k-diffusion's eta.

Let lambda = log(alpha / sigma) and h the step's length in it. The reverse SDE in which noise is
exchanged at the rate eta (0 is the probability-flow ODE, 1 the reverse of the forward SDE;
SA-Solver writes tau^2) has the same marginals for every eta >= 0, and reads exactly

    x_s = (sigma_s / sigma_t) exp(-eta h) x_t + sigma_s sqrt(1 - exp(-2 eta h)) z
          + alpha_s (1 + eta) h int_0^1 exp(-(1 + eta) h (1 - u)) x0(u) du.

Freezing x0 gives alpha_s x0 + sigma_s (exp(-eta h) eps + sqrt(1 - exp(-2 eta h)) z), DDIM's step
for eta = 0 and DDPM's for 1. What x0 changes along the step is added as in `phi`, with z = -(1 +
eta) h, so that each multistep method for the ODE is one for the SDE. With noise, all of order 2 and
above have the weak order 2, as measured on Gaussian data, and the strong order 1: more would take
more of the path than its increments.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose, not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.ancestral import levels
from jdiff.solvers.base import Solver
from jdiff.solvers.dpmpp import dpmpp_2m, dpmpp_3m, dpmpp_3m_published
from jdiff.solvers.multistep import History, Multistep, nodes_of, ramped, remember
from jdiff.solvers.res import res_multistep
from jdiff.solvers.singlestep import has_inside, inner_time

Number = Array | float


def exchange(eta: Number, h: Array) -> tuple[Array, Array]:
    """(exp(-eta h), sqrt(1 - exp(-2 eta h))): the shares of sigma_s carried over and new."""
    h = jnp.minimum(h, 1e6)  # eta = 0 exchanges nothing, over an infinite step too
    return jnp.exp(-eta * h), jnp.sqrt(-jnp.expm1(-2.0 * eta * h))


@struct
class MultistepSDE(Solver):
    """A multistep method in x0 on the reverse SDE.

    Attributes:
      method: the method on the ODE, whose weights are used.
      eta: the rate of exchange.
      s_noise: a factor on the noise; 1 keeps the marginals.
    """

    method: Multistep
    eta: Number = 1.0
    s_noise: Number = 1.0

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def init(self, x: PyTree, times: Array) -> History:
        """The method's empty history."""
        return self.method.init(x, times)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: History, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, History, Prediction]:  # fmt: skip
        """The module's formula."""
        prediction = denoise(x, broadcast_time(t, x), cond)

        def update(sched: Schedule, x0: Array, eps: Array, z: Array, *earlier: Array) -> Array:
            nodes = nodes_of(sched, s, t, memory.times, memory.count)
            keep, up = exchange(self.eta, 0.5 * (sched.logsnr(s) - sched.logsnr(t)))
            x_next = sched.alpha(s) * x0 + sched.sigma(s) * (keep * eps + self.s_noise * up * z)
            length = -(1.0 + self.eta) * nodes.h
            for w, value in zip(ramped(self.method.weights, length, nodes), earlier):
                x_next = x_next - sched.alpha(s) * length * w * (value - x0)
            return x_next

        z = noise.between(x, t, s)
        x_next = schedule_map(update, schedule, *prediction[:2], z, *memory.values)
        return x_next, remember(memory, prediction.x0, t), prediction


@struct
class DPMppSDE(Solver):
    """Two stages a step.

    Attributes:
      eta: the share of the posterior's deviation that is new, as in `ancestral`.
      s_noise: a factor on the noise; 1 keeps the marginals.
      r: where the second evaluation lies.
    """

    eta: Number = 1.0
    s_noise: Number = 1.0
    r: Number = 0.5

    order: ClassVar[int] = 2  # for eta = 0 and 1; between, its stages disagree and it is 1
    evaluations: ClassVar[int] = 2

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Both stages on one path: the noise of the step is that up to the stage and from it."""
        start = denoise(x, broadcast_time(t, x), cond)
        x0, eps = start.x0, start.eps

        def arrive(sched: Schedule, x0: Array, eps: Array, z: Array, at: Array) -> Array:
            keep, up = levels(sched, t, at, self.eta)
            return sched.alpha(at) * x0 + sched.sigma(at) * (keep * eps + self.s_noise * up * z)

        def one_stage() -> PyTree:
            z = noise.between(x, t, s)
            return schedule_map(lambda *a: arrive(*a, s), schedule, x0, eps, z)

        def two_stages() -> PyTree:
            u = inner_time(schedule, t, s, self.r)
            before = noise.between(x, t, u)
            after = noise.between(x, u, s, part=1)
            x_u = schedule_map(lambda *a: arrive(*a, u), schedule, x0, eps, before)
            stage = denoise(x_u, broadcast_time(u, x), cond)

            def finish(
                sched: Schedule, x0: Array, eps: Array, y: Array, before: Array, after: Array
            ) -> Array:
                lam_t, lam_u, lam_s = (0.5 * sched.logsnr(a) for a in (t, u, s))
                h, ahead = lam_s - lam_t, lam_u - lam_t
                # (SNR_u - SNR_t) / (SNR_s - SNR_t): the path's clock up to the stage
                share = jnp.exp(2.0 * (ahead - h)) * jnp.expm1(-2.0 * ahead) / jnp.expm1(-2.0 * h)
                rest = jnp.expm1(2.0 * (ahead - h)) / jnp.expm1(-2.0 * h)
                z = jnp.sqrt(share) * before + jnp.sqrt(rest) * after
                keep, _ = levels(sched, t, s, self.eta)
                slope = (1.0 - keep * jnp.exp(-h)) * 0.5 * h / ahead
                return arrive(sched, x0, eps, z, s) + sched.alpha(s) * slope * (y - x0)

            return schedule_map(finish, schedule, x0, eps, stage.x0, before, after)

        inside = has_inside(schedule, t, s)
        return jax.lax.cond(inside, two_stages, one_stage), memory, start


def dpmpp_sde(eta: Number = 1.0, s_noise: Number = 1.0, r: Number = 0.5) -> DPMppSDE:
    """k-diffusion's sample_dpmpp_sde: DPM-Solver++(2S) with noise in both stages.

    Weak order 2 for eta = 1 and order 2 for 0, where it is `dpmpp_2s`; 1 between. Its eta is a
    share of the posterior's deviation: the rate of exchange is eta^2. Two evaluations a step.

    Args:
      eta: the share of the posterior's deviation that is new, 0 or more.
      s_noise: a factor on the noise; 1 keeps the marginals.
      r: where in (0, 1] of the step, in log SNR, the second evaluation lies.

    Raises:
      UserError: a negative eta or s_noise, r outside (0, 1].
    """
    not_negative("dpmpp_sde", eta=eta, s_noise=s_noise)
    if isinstance(r, int | float) and not 0 < r <= 1:
        raise UserError(f"dpmpp_sde: r={r} given; it lies in (0, 1].")
    return DPMppSDE(eta, s_noise, r)


def dpmpp_2m_sde(
    eta: Number = 1.0, s_noise: Number = 1.0, kind: str = "midpoint"
) -> MultistepSDE:  # fmt: skip
    """DPM-Solver++(2M) on the SDE, weak order 2; eta = 0 is `dpmpp_2m` (kind "midpoint").

    Args:
      eta: the rate of exchange, 0 or more; 1 is the reverse SDE.
      s_noise: a factor on the noise; 1 keeps the marginals.
      kind: "midpoint" or "heun" (`res_multistep`'s weights), as in k-diffusion and diffusers.

    Raises:
      UserError: a negative eta or s_noise, another kind.
    """
    not_negative("dpmpp_2m_sde", eta=eta, s_noise=s_noise)
    methods = {"midpoint": dpmpp_2m, "heun": res_multistep}
    return MultistepSDE(methods[choose("dpmpp_2m_sde kind", kind, methods)](), eta, s_noise)


def dpmpp_3m_sde(
    eta: Number = 1.0, s_noise: Number = 1.0, kind: str = "restored"
) -> MultistepSDE:  # fmt: skip
    """DPM-Solver++(3M) on the SDE, weak order 2; eta = 0 is `dpmpp_3m`.

    Args:
      eta: the rate of exchange, 0 or more; 1 is the reverse SDE.
      s_noise: a factor on the noise; 1 keeps the marginals.
      kind: "restored", or "published" as in k-diffusion, with half the second derivative
        (see `dpmpp_3m`).

    Raises:
      UserError: a negative eta or s_noise, another kind.
    """
    not_negative("dpmpp_3m_sde", eta=eta, s_noise=s_noise)
    methods = {"restored": dpmpp_3m, "published": dpmpp_3m_published}
    return MultistepSDE(methods[choose("dpmpp_3m_sde kind", kind, methods)](), eta, s_noise)
