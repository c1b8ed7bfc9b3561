"""Langevin dynamics at fixed noise levels: score-based sampling before, and beside, the SDE.

A Langevin step at level t leaves the marginal of x_t as it is, up to its own step size:

    x <- x + a / 2 score(x, t) + sqrt(a) z,        score = -eps / sigma.

`annealed_langevin` makes T of them at each level of a ladder (Song and Ermon 2019, 1907.05600);
`predictor_corrector` makes some after each step of another solver (Song et al. 2021, 2011.13456).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, positive
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, expand, static, struct
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers.base import Solver, ends_at_data, safe_ratio
from jdiff.solvers.exponential import ddim_update

Number = Array | float
#: (schedule, eps, z) -> the step size a `[B]` of one leaf.
Size = Callable[[Schedule, Array, Array], Array]


@struct
class ReverseDiffusion(Solver):
    """The forward transition's discretisation, reversed: Song et al.'s predictor."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """x_s = (2 - a) x_t + G^2 score + G z, where q(x_t | x_s) = N(a x_s, G^2)."""
        prediction = denoise(x, broadcast_time(t, x), cond)

        def update(sched: Schedule, x: Array, x0: Array, eps: Array, z: Array) -> Array:
            sigma_t, a = sched.sigma(t), sched.alpha(t) / sched.alpha(s)
            big_g = sigma_t * jnp.sqrt(-jnp.expm1(sched.logsnr(t) - sched.logsnr(s)))
            x_next = (2.0 - a) * x - big_g**2 / sigma_t * eps + big_g * z
            return jnp.where(sched.sigma(s) == 0, sched.alpha(s) * x0, x_next)

        z = noise.between(x, t, s)
        x_next = schedule_map(update, schedule, x, prediction.x0, prediction.eps, z)
        return x_next, memory, prediction


@struct
class PredictorCorrector(Solver):
    """A predictor's step, then Langevin steps at the level it came to.

    Attributes:
      predictor: the solver that changes the level.
      snr: r, which sets the step size.
      steps: Langevin steps a level.
    """

    predictor: Solver
    snr: Number
    steps: int = static()

    order: ClassVar[int] = 1

    @property
    def evaluations(self) -> int:
        """The predictor's and one a Langevin step."""
        return self.predictor.evaluations + self.steps

    def check(self, schedule: PyTree, times: Array) -> None:
        """What the predictor refuses."""
        self.predictor.check(schedule, times)

    def init(self, x: PyTree, times: Array) -> Any:
        """The predictor's memory."""
        return self.predictor.init(x, times)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithms 2 to 5 of Song et al. 2021: predict, then correct at s; not at the data."""
        x, memory, prediction = self.predictor.step(denoise, schedule, x, memory, t, s, noise, cond)

        def size(sched: Schedule, eps: Array, z: Array) -> Array:
            """2 alpha_i (r |z| / |score|)^2, alpha_i = 1 - beta of the step that came here."""
            norm = lambda a: jnp.sqrt(jnp.sum(jnp.square(a), axis=tuple(range(1, a.ndim))))
            alpha = jnp.square(sched.alpha(t) / sched.alpha(s))
            # safe_ratio: at a mode of the density the score is 0
            ratio = safe_ratio(norm(z) * sched.sigma(s), norm(eps))
            return 4.0 * alpha * jnp.square(self.snr * ratio)

        moves = (t != s) & ~ends_at_data(schedule, s)
        numbers = range(1, self.steps + 1)
        chain = lambda x: langevin(denoise, schedule, x, s, size, numbers, noise, cond)
        return jax.lax.cond(moves, chain, lambda x: x, x), memory, prediction


@struct
class AnnealedLangevin(Solver):
    """T Langevin steps at each level; the last level's end in the denoiser's image.

    Attributes:
      step_size: epsilon / sigma_L^2, so that a / sigma_i^2 at every level.
      steps: T.
    """

    step_size: Number
    steps: int = static()

    order: ClassVar[int] = 0  # the grid is not refined: more levels are more steps of the chain

    @property
    def evaluations(self) -> int:
        """One a Langevin step."""
        return self.steps

    def count(self, steps: int) -> int:
        """T at each level, and the last image."""
        return steps * self.steps + 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 1 of Song and Ermon 2019 at level t; then x / alpha is taken to level s."""
        prediction = denoise(x, broadcast_time(t, x), cond)

        def size(sched: Schedule, eps: Array, z: Array) -> Array:
            return jnp.full(eps.shape[:1], self.step_size * jnp.square(sched.sigma(t)))

        def chain() -> PyTree:
            y = langevin_step(schedule, x, prediction, t, size, noise, 1)
            y = langevin(denoise, schedule, y, t, size, range(2, self.steps + 1), noise, cond)

            def image() -> PyTree:
                last = denoise(y, broadcast_time(t, x), cond).x0
                return schedule_map(lambda sched, a: sched.alpha(s) * a, schedule, last)

            def carry() -> PyTree:
                return schedule_map(
                    lambda sched, a: sched.alpha(s) / sched.alpha(t) * a, schedule, y
                )

            return jax.lax.cond(ends_at_data(schedule, s), image, carry)

        # Pure noise (alpha = 0) is a sample of its level already: DDIM's step leaves it.
        stays = (t == s) | (first(schedule).alpha(t) == 0)
        leave = lambda: ddim_update(schedule, prediction, s)
        return jax.lax.cond(stays, leave, chain), memory, prediction


def reverse_diffusion() -> ReverseDiffusion:
    """Song et al.'s reverse diffusion sampler (2011.13456, equation 46), weak order 1.

    On alpha = 1 it is their ancestral sampler with the noise of q(x_t | x_s).
    """
    return ReverseDiffusion()


def predictor_corrector(
    predictor: Solver | None = None, snr: Number = 0.16, steps: int = 1
) -> PredictorCorrector:  # fmt: skip
    """Predictor-corrector sampling (Song et al. 2021, algorithms 2 to 5), 1 + steps evaluations.

    The step size is 2 alpha_i (snr |z| / |score|)^2, its norms over one sample (score_sde takes
    their means over the batch, so that a sample depends on its neighbours). The corrector comes
    after the predictor, as in the paper (before it in score_sde). Its step has a bias that does not
    vanish with the grid: the marginals are those of the path up to O(snr^2).

    Args:
      predictor: any solver; `reverse_diffusion()` unless given.
      snr: r, positive: 0.16 for VE and 0.01 for VP on CIFAR-10 in the paper.
      steps: Langevin steps a level, at least 1.

    Raises:
      UserError: an snr that is not positive, fewer steps.
    """
    positive("predictor_corrector", snr=snr)
    if steps < 1:
        raise UserError(f"predictor_corrector: steps={steps} given; at least 1 is needed.")
    return PredictorCorrector(reverse_diffusion() if predictor is None else predictor, snr, steps)


def annealed_langevin(step_size: Number = 0.2, steps: int = 100) -> AnnealedLangevin:
    """Annealed Langevin dynamics (Song and Ermon 2019, algorithm 1) over the grid's levels.

    At level i a = epsilon sigma_i^2 / sigma_L^2, so one number says it at every level:

    Args:
      step_size: epsilon / sigma_L^2, in (0, 4), beyond which the chain diverges. NCSN has 2e-5 /
        0.01^2 = 0.2. NCSNv2 writes a for our a / 2, so its CIFAR-10 6.2e-6 is 0.124.
      steps: T, the Langevin steps a level: 100 in NCSN, 5 in NCSNv2.

    Raises:
      UserError: a step size outside (0, 4), fewer than 1 step.
    """
    if isinstance(step_size, int | float) and not 0 < step_size < 4:
        raise UserError(
            f"annealed_langevin: step_size={step_size} given; epsilon / sigma_L^2 lies in (0, 4)."
        )
    if steps < 1:
        raise UserError(f"annealed_langevin: steps={steps} given; at least 1 is needed.")
    return AnnealedLangevin(step_size, steps)


def langevin_step(
    schedule: PyTree, x: PyTree, prediction: Prediction, t: Array, size: Size, noise: Noise,
    number: Array | int,
) -> PyTree:  # fmt: skip
    """x - a / (2 sigma) eps + sqrt(a) z, with a `[B]` = size(schedule, eps, z), leaf by leaf."""

    def move(sched: Schedule, x: Array, eps: Array, z: Array) -> Array:
        a = expand(size(sched, eps, z), x)
        return (x - 0.5 * a / sched.sigma(t) * eps + jnp.sqrt(a) * z).astype(x.dtype)

    return schedule_map(move, schedule, x, prediction.eps, noise.free(x, number))


def langevin(
    denoise: Any, schedule: PyTree, x: PyTree, t: Array, size: Size, numbers: range,
    noise: Noise, cond: PyTree,
) -> PyTree:  # fmt: skip
    """Langevin steps at level t with the free draws of these numbers (0 is a predictor's)."""

    def one(number: Array, x: PyTree) -> PyTree:
        prediction = denoise(x, broadcast_time(t, x), cond)
        return langevin_step(schedule, x, prediction, t, size, noise, number)

    return jax.lax.fori_loop(numbers.start, numbers.stop, one, x)
