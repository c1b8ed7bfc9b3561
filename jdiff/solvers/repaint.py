"""RePaint (Lugmayr et al. 2022, 2201.09865): inpainting by a solver that resamples."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.noise import Noise
from jdiff.operators import measurement
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, static, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import Solver
from jdiff.solvers.stochastic import ddpm

_DRAWS = 64  # that one substep may make


@struct
class RePaint(Solver):
    """Another solver's steps, with the known pixels put in after each, and repeated."""

    keep: Array
    inner: Solver
    resample: int = static()
    jump: int = static()
    entry: str = static()

    @property
    def order(self) -> int:
        """That of a first-order method: the known pixels are put in from outside."""
        return 1

    @property
    def evaluations(self) -> int:
        """Denoiser calls of a full step."""
        return self.resample * self.jump * self.inner.evaluations

    def check(self, schedule: PyTree, times: Array) -> None:
        """What the inner solver asks for, and a last step that can be divided."""
        self.inner.check(schedule, times)
        if self.jump > 1 and jnp.isinf(times[-1]):
            raise UserError(
                f"repaint: jump={self.jump} divides steps evenly in t, and times[-1] is "
                f"{float(times[-1])}; use jump=1, or a schedule whose data lies at a finite t."
            )

    def count(self, steps: int) -> int:
        """The last of the substeps is the inner solver's last, each time that it is taken."""
        last = self.resample * ((self.jump - 1) * self.inner.evaluations + self.inner.count(1))
        return (steps - 1) * self.evaluations + last

    def init(self, x: PyTree, times: Array) -> Any:
        """The inner solver's memory before its first step, where every pass begins."""
        return self.inner.init(x, times)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """Algorithm 1, with its jumps: from t to s in `jump` substeps, `resample` times."""
        y, rest = measurement(cond, self.entry)
        inside = jnp.linspace(t, s, self.jump + 1)[1:-1]
        times = jnp.concatenate([t[None], inside, s[None]])  # s itself: it may be -inf

        def substep(carry: tuple, number: Array) -> tuple[tuple, None]:
            x, inner, observed = carry
            i = number % self.jump
            own = _Draws(noise, number)
            starts = i == 0
            again = starts & (number > 0)
            back = diffuse(schedule, x, s, t, own.free(x, _DRAWS // 2 - 1))
            x = jax.tree.map(lambda a, b: jnp.where(again, a.astype(b.dtype), b), back, x)
            inner = jax.tree.map(lambda a, b: jnp.where(starts, a, b), memory, inner)
            now, then = times[i], times[i + 1]
            x_next, inner, prediction = self.inner.step(
                denoise, schedule, x, inner, now, then, own, rest
            )
            x_next = put_known(schedule, x_next, y, self.keep, then, own.free(x, _DRAWS // 2 - 2))
            x_next = jax.tree.map(lambda a, b: a.astype(b.dtype), x_next, x)
            observed = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), prediction, observed)
            return (x_next, inner, observed), None

        numbers = jnp.arange(self.resample * self.jump)
        shapes = jax.eval_shape(
            lambda x: self.inner.step(denoise, schedule, x, memory, t, s, noise, rest)[2], x
        )
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (x, _, observed), _ = jax.lax.scan(substep, (x, memory, nothing), numbers)
        return x, memory, observed


class _Draws(Noise):
    """A substep's own draws. No interval's increments: intervals are walked more than once."""

    def __init__(self, noise: Noise, number: Array):
        self.noise, self.first = noise, number * _DRAWS

    def between(self, x: PyTree, t: Array, s: Array, part: int = 0) -> PyTree:
        """A free draw for each part."""
        return self.noise.free(x, self.first + _DRAWS // 2 + part)

    def free(self, x: PyTree, i: int = 0) -> PyTree:
        """A free draw."""
        return self.noise.free(x, self.first + i)


def put_known(schedule: PyTree, x: PyTree, y: PyTree, keep: Array, s: Array, z: PyTree) -> PyTree:
    """x_s with its known pixels replaced by alpha_s y + sigma_s z (equation 8)."""

    def leaf(sched: Schedule, x: Array, y: Array, z: Array) -> Array:
        known = sched.alpha(s) * y + sched.sigma(s) * z
        return jnp.where(keep, known, x)

    return schedule_map(leaf, schedule, x, y, z)


def diffuse(schedule: PyTree, x: PyTree, s: Array, t: Array, z: PyTree) -> PyTree:
    """A draw of q(x_t | x_s), t the noisier."""

    def leaf(sched: Schedule, x: Array, z: Array) -> Array:
        gap = sched.logsnr(t) - sched.logsnr(s)
        std = sched.sigma(t) * jnp.sqrt(-jnp.expm1(gap))
        return sched.alpha(t) / sched.alpha(s) * x + std * z

    return schedule_map(leaf, schedule, x, z)


def repaint(
    keep: Any, *, inner: Solver | None = None, resample: int = 1, jump: int = 1, entry: str = "y"
) -> RePaint:
    """Inpainting: each step's known pixels are those of y, noised; steps are repeated.

    A step of the grid is taken in `jump` substeps, evenly spaced in t; then the state is noised
    back to the step's start and taken again, `resample` times in all. So the unknown pixels, drawn
    from the model's own marginals, come to fit the known ones: without repeats the draw is not from
    the conditional distribution. Its mean's error falls as 1 / resample; its variance needs small
    steps besides, since a first-order step loses a little of it and every repeat loses it again.
    The paper's grid is `grids.uniform(schedule, 25)` with resample=10, jump=10 (it does not repeat
    the first step).

    y, the images with anything in the unknown pixels, is read from `cond[entry]` and the denoiser
    is not shown it. The denoiser-only half, known pixels put into x0, is `guidance.ddnm` with a
    mask. Where the mask has to depend on the sample, give keep `[B, ...]` and no batch.

    Args:
      keep: 1 (True) where pixels are known; broadcasts to `[B, ...]`.
      inner: the solver of the substeps, `solvers.ddpm()` unless given; multistep solvers begin
        without a past in each pass.
      resample: times that each step is taken, the paper's r.
      jump: substeps of a step, the paper's j.

    Raises:
      UserError: resample or jump below 1; at the call, no cond[entry].
    """
    for name, value in {"resample": resample, "jump": jump}.items():
        if not (isinstance(value, int) and value >= 1):
            raise UserError(f"repaint: {name}={value!r} given; it is a whole number, 1 or more.")
    return RePaint(
        jnp.asarray(keep, bool), ddpm() if inner is None else inner, resample, jump, entry
    )
