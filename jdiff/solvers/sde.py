"""The reverse SDE with a free diffusion coefficient w(t), by Euler and Maruyama's method.

    dx = (v(x, t) - w(t) / 2 score(x, t)) dt + sqrt(w(t)) dw,    t falling,

has the marginals of the path for every w(t) >= 0 (Ma et al. 2024, SiT, 2401.08740, equation 5; Song
et al. 2021, 2011.13456): w = 0 is the probability-flow ODE, w = g^2 the reverse of the forward SDE.
v = dx/dt = alpha' x0 + sigma' eps, and the score is -eps / sigma.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from jdiff.errors import UserError, choose, not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction, endpoint_velocity
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import Solver
from jdiff.solvers.variables import finite_velocity

#: (schedule, t) -> w(t).
Diffusion = Callable[[Schedule, Array], Array]


def _share(sched: Schedule, t: Array) -> Array:
    return t / sched.t_max


#: w(t) / 2 by SiT's names, with its t = 1 - ours / t_max. The schedule's own g^2 is "sbdm".
FORMS: dict[str, Diffusion] = {
    "zero": lambda sched, t: jnp.zeros_like(t),
    "constant": lambda sched, t: jnp.ones_like(t),
    "sbdm": lambda sched, t: 0.5 * sched.diffusion(t) ** 2,
    "sigma": lambda sched, t: sched.sigma(t),
    "linear": _share,
    "decreasing": lambda sched, t: 0.25 * (1.0 - jnp.cos(jnp.pi * _share(sched, t))) ** 2,
    "increasing_decreasing": lambda sched, t: jnp.sin(jnp.pi * _share(sched, t)) ** 2,
}
LAST = ("tweedie", "mean", "euler")


@struct
class EulerMaruyama(Solver):
    """One step of the method.

    Attributes:
      scale: a factor on w.
      form: w / 2 as a name in `FORMS`, or a function (schedule, t) -> w.
      last: how the step to the data is made.
    """

    scale: Array | float = 1.0
    form: str | Diffusion = static("sigma")
    last: str = static("tweedie")

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def check(self, schedule: PyTree, times: Array) -> None:
        """Refuses an infinite velocity at the start, and a last step of infinite length."""
        finite_velocity("euler_maruyama", schedule, times)
        if self.last != "tweedie" and jnp.isinf(times[-1]):
            raise UserError(
                f"euler_maruyama: last={self.last!r} follows the path to times[-1], which is "
                f"{float(times[-1])}; use last='tweedie'."
            )

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """x + (s - t) (v - w / 2 score) + sqrt(w (t - s)) z."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        velocity = endpoint_velocity(schedule, prediction, t)

        def update(sched: Schedule, x: Array, x0: Array, eps: Array, v: Array, z: Array) -> Array:
            w = self._w(sched, t)
            drift = v + 0.5 * w / sched.sigma(t) * eps
            ends = {
                "tweedie": sched.alpha(s) * x0, "mean": x + (s - t) * drift,
                "euler": x + (s - t) * v,
            }  # fmt: skip
            x_next = x + (s - t) * drift + jnp.sqrt(w * (t - s)) * z
            return jnp.where(sched.sigma(s) == 0, ends[self.last], x_next)

        z = noise.between(x, t, s)
        x_next = schedule_map(update, schedule, x, prediction.x0, prediction.eps, velocity, z)
        return x_next, memory, prediction

    def _w(self, sched: Schedule, t: Array) -> Array:
        """w(t); 0 where it has no finite value ("sbdm" at alpha = 0), a step of the ODE."""
        if isinstance(self.form, str):
            w = 2.0 * FORMS[self.form](sched, t)
            if self.form != "sbdm" and sched.T is not None:
                w = w / sched.T  # SiT's time is 1 where a table's is T
        else:
            w = self.form(sched, t)
        w = self.scale * w
        return jnp.where(jnp.isfinite(w), jnp.maximum(w, 0.0), 0.0)


def euler_maruyama(
    form: str | Diffusion = "sigma", scale: Array | float = 1.0, last: str = "tweedie"
) -> EulerMaruyama:  # fmt: skip
    """Euler-Maruyama on the reverse SDE with diffusion w(t), weak order 1, strong order 1.

    Stable where w (t - s) is small beside 2 sigma^2: "sbdm" on rectified_flow grows without bound
    towards t = 1, so start it below (`first=0.96` of a grid).

    Args:
      form: w(t) = 2 scale times, with u = t / t_max: "sigma" (sigma(t)), "constant" (1), "linear"
        (u), "decreasing" ((1 - cos(pi u))^2 / 4), "increasing_decreasing" (sin(pi u)^2), "sbdm"
        (g(t)^2 / 2: the reverse of the forward SDE), "zero" (the ODE). On a table of T steps all
        but "sbdm" are divided by T. Or a function (schedule, t) -> w, times `scale`; a new function
        compiles anew.
      scale: SiT's norm, 0 or more; 0 is the ODE.
      last: the step to the data: "tweedie" predicts the image, "mean" follows the drift without
        noise, "euler" follows the ODE. SiT makes it from t = 0.04 (`last=0.04` of a grid).

    Raises:
      UserError: an unknown form or last, a negative scale.
    """
    if not callable(form):
        choose("euler_maruyama form", form, FORMS)
    not_negative("euler_maruyama", scale=scale)
    return EulerMaruyama(scale, form, choose("euler_maruyama last", last, LAST))
