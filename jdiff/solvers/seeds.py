"""SEEDS (Gonzalez et al. 2023, 2305.14267): singlestep exponential integrators of the reverse SDE.

A step has inner times t > u_1 > ... > u_n = s, and noise z_k in each interval between them. With a
the length in lambda from t to u_i, and Z = -(1 + eta) a, the state there is one of

    "x0"    alpha x0 + sigma exp(-eta a) eps - alpha Z w(Z) (x0_j - x0)
    "eps"   alpha x0 + sigma (1 - eta expm1(a)) eps - (1 + eta) sigma a w(a) (eps_j - eps)

(alpha, sigma at u_i; w the weight of `phi` for the stage before) plus the noise of the intervals so
far, which decays on its way from its own end to u_i: exact in the linear part, and of one path in
all stages. "eps" is published as VP-SEEDS, "x0" is its form in the data prediction (ComfyUI's
seeds_2 and seeds_3), bounded at both ends of the path. eta is as in `dpmpp_sde`: the paper has 1,
0 is the ODE. Weak order 2, as measured on Gaussian data; 1 for SEEDS-1.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose, not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers import phi
from jdiff.solvers.base import Solver
from jdiff.solvers.dpmpp_sde import exchange
from jdiff.solvers.singlestep import has_inside, inner_time

Number = Array | float


@struct
class SEEDS(Solver):
    """One, two or three stages.

    Attributes:
      nodes: where the inner stages lie in the step: none, r or (r1, r2).
      eta: the rate of exchange.
      s_noise: a factor on the noise; 1 keeps the marginals.
      predict: what is taken to be smooth in lambda, "x0" or "eps".
    """

    nodes: tuple[Number, ...]
    eta: Number = 1.0
    s_noise: Number = 1.0
    predict: str = static("x0")

    @property
    def order(self) -> int:
        """The weak order; with eta = 0 that of three stages on the ODE is 3."""
        return min(len(self.nodes) + 1, 2)

    @property
    def evaluations(self) -> int:
        """The number of stages."""
        return len(self.nodes) + 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Any, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Any, Prediction]:  # fmt: skip
        """The module's stages; one alone, in x0, where the step has no inside."""
        start = denoise(x, broadcast_time(t, x), cond)

        def to_the_end() -> PyTree:
            z = noise.between(x, t, s)
            return self._arrive(schedule, "x0", start, None, [t, s], [z])

        def stages() -> PyTree:
            times = [t, *(inner_time(schedule, t, s, r) for r in self.nodes), s]
            zs, y = [], None
            for i, (before, u) in enumerate(pairwise(times)):
                zs.append(noise.between(x, before, u, part=i))
                x_u = self._arrive(schedule, self.predict, start, y, times[: i + 2], zs)
                if i < len(self.nodes):
                    y = getattr(denoise(x_u, broadcast_time(u, x), cond), self.predict)
            return x_u

        inside = has_inside(schedule, t, s)
        return jax.lax.cond(inside, stages, to_the_end), memory, start

    def _weights(self) -> Callable[..., list[Array]]:
        """SEEDS-2 takes the prediction to be that of the middle, SEEDS-3 a straight line."""
        return phi.midpoint if len(self.nodes) == 1 else phi.adams

    def _arrive(
        self, schedule: PyTree, predict: str, start: Prediction, last: PyTree | None,
        times: list[Array], zs: list[PyTree],
    ) -> PyTree:  # fmt: skip
        """The state at times[-1], from the start at times[0] and the stage at times[-2], if any."""
        y = getattr(start, predict)

        def update(
            sched: Schedule, x0: Array, eps: Array, y: Array, last: Array, *zs: Array
        ) -> Array:
            u = times[-1]
            alpha, sigma, eta = sched.alpha(u), sched.sigma(u), self.eta
            lams = [0.5 * sched.logsnr(a) for a in times]
            a = lams[-1] - lams[0]
            if predict == "x0":
                keep, _ = exchange(eta, a)
                scale, length = alpha, -(1.0 + eta) * a
            else:
                keep = 1.0 - eta * jnp.expm1(a)
                scale, length = (1.0 + eta) * sigma, a
            x_u = alpha * x0 + sigma * keep * eps
            if len(times) > 2:
                (w,) = self._weights()(length, [(lams[-2] - lams[0]) / a])
                x_u = x_u - scale * length * w * (last - y)
            for i, ((low, high), z) in enumerate(zip(pairwise(lams), zs), 1):
                later = lams[-1] - high if i < len(zs) else 0.0  # inf - inf at the data
                if predict == "x0":
                    std = exchange(eta, later)[0] * exchange(eta, high - low)[1]
                else:
                    std = jnp.sqrt(eta * jnp.expm1(2.0 * (high - low))) * jnp.exp(later)
                x_u = x_u + self.s_noise * sigma * std * z
            return x_u

        last = y if last is None else last
        return schedule_map(update, schedule, start.x0, start.eps, y, last, *zs)


def seeds_1(eta: Number = 1.0, s_noise: Number = 1.0, predict: str = "eps") -> SEEDS:
    """SEEDS-1 (2305.14267, equation 13), weak order 1; in "x0" with eta = 1 it is `ddpm`.

    Args:
      eta: the rate of exchange, 0 or more.
      s_noise: a factor on the noise; 1 keeps the marginals.
      predict: "x0" or "eps" (see the module).

    Raises:
      UserError: a negative eta or s_noise, another `predict`.
    """
    return _seeds("seeds_1", (), eta, s_noise, predict)


def seeds_2(
    eta: Number = 1.0, s_noise: Number = 1.0, r: Number = 0.5, predict: str = "x0"
) -> SEEDS:  # fmt: skip
    """SEEDS-2 (2305.14267, algorithm 2), two evaluations a step; `predict="eps"` as published.

    In "x0" it is `dpmpp_sde` for eta = 1; for eta = 0 it is `dpmpp_2s`, or `dpm_solver` of order 2.

    Args:
      eta, s_noise, predict: see `seeds_1`.
      r: where in (0, 1) of the step, in log SNR, the second evaluation lies.

    Raises:
      UserError: as `seeds_1`; r outside (0, 1).
    """
    return _seeds("seeds_2", (r,), eta, s_noise, predict)


def seeds_3(
    eta: Number = 1.0, s_noise: Number = 1.0, r1: Number = 1 / 3, r2: Number = 2 / 3,
    predict: str = "x0",
) -> SEEDS:  # fmt: skip
    """SEEDS-3 (2305.14267, algorithm 3), three evaluations a step; `predict="eps"` as published.

    Args:
      eta, s_noise, predict: see `seeds_1`.
      r1, r2: where in (0, 1) of the step, in log SNR, the inner evaluations lie; r1 < r2.

    Raises:
      UserError: as `seeds_1`; r1 and r2 outside (0, 1) or unordered.
    """
    return _seeds("seeds_3", (r1, r2), eta, s_noise, predict)


def _seeds(
    name: str, nodes: tuple[Number, ...], eta: Number, s_noise: Number, predict: str
) -> SEEDS:  # fmt: skip
    not_negative(name, eta=eta, s_noise=s_noise)
    choose(f"{name} predict", predict, ("x0", "eps"))
    known = [r for r in nodes if isinstance(r, int | float)]
    if not all(low < high for low, high in pairwise([0.0, *known, 1.0])):
        raise UserError(f"{name}: nodes {tuple(nodes)} given; they rise inside (0, 1).")
    return SEEDS(nodes, eta, s_noise, predict)
