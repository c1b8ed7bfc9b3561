"""What a scheduler's config becomes: `Sampler`, and the two things of diffusers that it needs.

`Told` is a parameterisation whose network is told whole steps, `Clip` a denoiser whose image is
kept in its range as a scheduler does it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser
from jdiff.guidance.base import Guided
from jdiff.interop.spacings import Dynamic
from jdiff.predictions import Parameterization, Prediction, from_x0
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers import Solver

#: (alpha, sigma) at the first time -> what noise is multiplied with there.
_STARTS: dict[str, Callable[[Array, Array], Array]] = {
    "noise": lambda alpha, sigma: jnp.ones_like(sigma),
    "sigma": lambda alpha, sigma: sigma,
    "norm": lambda alpha, sigma: jnp.hypot(alpha, sigma),
}


@struct
class Told(Parameterization):
    """A parameterisation as diffusers has it.

    Attributes:
      rounding: of what the network is told: "none", "round", or "floor", as a cast to integers.
      sign: of the network's output.
    """

    rounding: str = static("none")
    sign: float = static(1.0)

    def row(self, schedule: Schedule, t: Array) -> tuple[Array, Array]:
        """That of the target, times the sign."""
        r0, r1 = Parameterization.row(self, schedule, t)
        return self.sign * r0, self.sign * r1

    def condition_time(self, schedule: PyTree, t: Array) -> PyTree:
        """c_noise, rounded. What is whole but for float32's rounding is not cast down."""
        told = Parameterization.condition_time(self, schedule, t)
        if self.rounding == "none":
            return told
        whole = jnp.round if self.rounding == "round" else lambda a: jnp.floor(a + 2e-4)
        return jax.tree.map(whole, told)


@struct
class Clip:
    """How x0 is kept in its range: clip_sample and thresholding.

    Attributes:
      limit: x0 is clipped to [-limit, limit] where quantile is None.
      quantile: else to this quantile of a sample's |x0|, between 1 and `most`, and divided by it.
      most: sample_max_value.
      consistent: whether eps is recomputed to agree with x, or stays (DDIM).
    """

    limit: float
    quantile: float | None
    most: float
    consistent: bool = static(True)

    def __call__(self, x0: Array) -> Array:
        """The clipped image `[B, ...]`."""
        if self.quantile is None:
            return jnp.clip(x0, -self.limit, self.limit)
        axes = tuple(range(1, x0.ndim))
        s = jnp.quantile(jnp.abs(x0), self.quantile, axis=axes, keepdims=True)
        s = jnp.clip(s, 1.0, self.most)
        return jnp.clip(x0, -s, s) / s


@struct
class Clipped(Guided):
    """A denoiser whose x0 is clipped, after all guidance."""

    denoiser: Any
    clip: Clip

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, ...]`, t `[B]` -> the prediction with x0 in its range."""
        t = broadcast_time(t, x)
        raw = self.denoiser(x, t, cond)
        x0 = jax.tree.map(self.clip, raw.x0)
        eps = from_x0(self.schedule, x, x0, t).eps if self.clip.consistent else raw.eps
        return raw._replace(x0=x0, eps=eps)


@struct
class Sampler:
    """How a checkpoint is sampled: all that `jdiff.sample` needs beside a network.

    Attributes:
      schedule: the noise schedule.
      parameterization: what the network predicts and is told.
      solver: the solver.
      clip: how x0 is kept in its range, or None.
      grid: the times, (schedule, n) -> `[n + 1]`.
      start_as: what noise is multiplied with at the start: "noise" (1), "sigma", or "norm"
        (sqrt(alpha^2 + sigma^2)).
      config: scheduler_config.json as it was read, as JSON.
      network: the class of the network that it was read for, "" for none.
    """

    schedule: Schedule
    parameterization: Parameterization
    solver: Solver
    clip: Clip | None
    grid: Callable[..., Array] = static()
    start_as: str = static("noise")
    config: str = static("{}")
    network: str = static("")

    def times(self, n: int, *, tokens: int | None = None) -> Array:
        """The times of n steps `[n + 1]`, or `[n]` where diffusers' last step has no length.

        Args:
          n: num_inference_steps.
          tokens: the image's number of patches, where the times depend on it (FLUX, Qwen-Image).

        Raises:
          UserError: a grid that the scheduler cannot make, or tokens that are needed.
        """
        if isinstance(getattr(self.grid, "shift", None), Dynamic):
            return self.grid(self.schedule, n, tokens)
        return self.grid(self.schedule, n)

    def start(self, noise: PyTree, times: Array) -> PyTree:
        """The state at times[0] that diffusers starts from, given standard normal noise."""
        scale = _STARTS[self.start_as]
        return schedule_map(
            lambda s, z: (scale(s.alpha(times[0]), s.sigma(times[0])) * z).astype(z.dtype),
            self.schedule, noise,
        )  # fmt: skip

    def denoiser(self, denoise: Any) -> Any:
        """`denoise`, guided or not, with its image kept in range as the scheduler does."""
        denoise = as_denoiser(denoise)
        return denoise if self.clip is None else Clipped(denoise, self.clip)
