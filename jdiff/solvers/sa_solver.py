"""SA-Solver (Xue et al. 2023, 2309.05019): stochastic Adams methods, a predictor and a corrector.

On the SDE of `dpmpp_sde` with eta = tau^2, x0 is the polynomial through earlier predictions (the
predictor, Adams-Bashforth) or those and the one at the step's end (the corrector, Adams-Moulton).
Both have the same noise, so what correcting changes at t is a sum of differences of predictions,

    delta = sum_j c_j (x0_j - x0_1),

in which neither noise nor the state before the step appears, and which the next step carries on
times exp(-tau^2 h) sigma_s / sigma_t.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose, not_negative
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule, first, schedule_map
from jdiff.solvers import phi
from jdiff.solvers.dpmpp_sde import exchange
from jdiff.solvers.multistep import History, Multistep, nodes_of, ramped, remember

Number = Array | float


@struct
class SASolver(Multistep):
    """A predictor of `predictor` and a corrector of `corrector` predictions (0: none).

    Attributes:
      tau: the stochasticity inside the range of sigma / alpha [s_min, s_max]; 0 outside.
      predictor, corrector: how many predictions each interpolates.
      variant: the weight of one free node, "adams" or "bh1".
      mode: "pec" or "pece", which evaluates again at the corrected state.
    """

    tau: Number
    s_min: Number
    s_max: Number
    predictor: int = static()
    corrector: int = static()
    variant: str = static()
    mode: str = static()

    @property
    def order(self) -> int:
        """The weak order for tau > 0."""
        return min(2, max(self.predictor, self.corrector))

    @property
    def evaluations(self) -> int:
        """Two where the corrected state is evaluated again."""
        return 2 if self.mode == "pece" else 1

    @property
    def length(self) -> int:
        """The corrector reaches one step further back than the predictor."""
        return max(self.predictor, self.corrector - 1) if self.corrector else self.predictor - 1

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: History, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, History, Prediction]:  # fmt: skip
        """The state predicted at t is corrected, that at s predicted. The last stays as it is."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        delta = jax.tree.map(jnp.zeros_like, prediction.x0)
        if self.corrector:
            delta = self._correction(schedule, memory, prediction.x0, t)
        if self.mode == "pece":
            x = jax.tree.map(jnp.add, x, delta)
            again = lambda: denoise(x, broadcast_time(t, x), cond)
            prediction = jax.lax.cond(memory.count > 0, again, lambda: prediction)
            delta = jax.tree.map(jnp.zeros_like, delta)

        eta = self._eta(schedule, t)

        def predict(
            sched: Schedule, x0: Array, eps: Array, z: Array, delta: Array, *earlier: Array
        ) -> Array:
            alpha_s, sigma_s = sched.alpha(s), sched.sigma(s)
            keep, up = exchange(eta, 0.5 * (sched.logsnr(s) - sched.logsnr(t)))
            x_next = alpha_s * x0 + sigma_s * (keep * (eps + delta / sched.sigma(t)) + up * z)
            kept = slice(self.predictor - 1)
            nodes = nodes_of(sched, s, t, memory.times[kept], memory.count)
            length = -(1.0 + eta) * nodes.h
            for w, value in zip(ramped(self.weights, length, nodes), earlier):
                x_next = x_next - alpha_s * length * w * (value - x0)
            return x_next

        z = noise.between(x, t, s)
        x_next = schedule_map(predict, schedule, *prediction[:2], z, delta, *memory.values)
        return x_next, remember(memory, prediction.x0, t), prediction

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """Those of `phi`; "bh1" gives a lone node 1 / (2 u), as the authors' code does."""
        if len(nodes) == 1 and self.variant == "bh1":
            return [0.5 / nodes[0]]
        return phi.adams(z, nodes)

    def _correction(self, schedule: PyTree, memory: History, x0: PyTree, t: Array) -> PyTree:
        """delta of the step that ended at t, with x0 predicted there."""
        base, *older = memory.times
        eta = self._eta(schedule, base)

        def change(sched: Schedule, x0: Array, last: Array, *earlier: Array) -> Array:
            nodes = nodes_of(sched, t, base, tuple(older), memory.count - 1)
            z, end = -(1.0 + eta) * nodes.h, jnp.ones_like(nodes.h)
            chosen = [phi.phis(z, 1)[0] if self.corrector == 1 else self.weights(z, [end])[0]]
            chosen += [jnp.zeros_like(z)] * len(older)
            for k in range(1, min(self.corrector - 1, len(older) + 1)):
                wider = phi.adams(z, [end, *nodes.at[:k]])
                wider += [jnp.zeros_like(z)] * (len(older) - k)
                chosen = [jnp.where(nodes.usable[k - 1], a, b) for a, b in zip(wider, chosen)]
            kept = slice(self.predictor - 1)
            fewer = nodes._replace(at=nodes.at[kept], usable=nodes.usable[kept])
            for k, w in enumerate(ramped(self.weights, z, fewer), 1):
                chosen[k] = chosen[k] - w
            made = (memory.count > 0) & (nodes.h > 0)
            scale = jnp.where(made, -sched.alpha(t) * z, 0.0)
            values = (x0, *earlier)
            return scale * sum(w * (value - last) for w, value in zip(chosen, values))

        return schedule_map(change, schedule, x0, *memory.values)

    def _eta(self, schedule: PyTree, t: Array) -> Array:
        """tau^2 of the step that starts at t."""
        sigma = first(schedule).sigma_ratio(t)
        return jnp.where((self.s_min <= sigma) & (sigma <= self.s_max), self.tau**2, 0.0)


def sa_solver(
    tau: Number = 1.0, s_min: Number = 0.0, s_max: Number = jnp.inf, predictor: int = 3,
    corrector: int = 3, variant: str = "adams", mode: str = "pec",
) -> SASolver:  # fmt: skip
    """SA-Solver (2309.05019, algorithm 1): weak order 2; tau = 0 is a method of the ODE.

    One evaluation a step, or two with mode="pece".

    Args:
      tau: the stochasticity of the reverse SDE, 0 or more; 1 is the reverse of the forward SDE.
      s_min, s_max: the range of sigma / alpha in which tau applies; the paper: [0.05, 1] for EDM.
      predictor: the number of predictions it interpolates, 1 to 4.
      corrector: the number of predictions it interpolates, that at the step's end included, 1 to
        4; 0 for none.
      variant: "adams" has the published integrals. "bh1" changes that of two predictions as the
        authors' code and diffusers do for few steps, without loss of order.
      mode: "pec", or "pece", which evaluates the corrected state too (ComfyUI's sa_solver_pece).

    Raises:
      UserError: a negative tau, s_min or s_max, another order, variant or mode.
    """
    not_negative("sa_solver", tau=tau, s_min=s_min, s_max=s_max)
    for name, number, low in (("predictor", predictor, 1), ("corrector", corrector, 0)):
        if number not in range(low, 5):
            raise UserError(f"sa_solver: {name}={number} given; allowed are {low} to 4.")
    choose("sa_solver variant", variant, ("adams", "bh1"))
    choose("sa_solver mode", mode, ("pec", "pece"))
    if mode == "pece" and not corrector:
        raise UserError("sa_solver: mode='pece' evaluates a corrected state; corrector=0 has none.")
    return SASolver(tau, s_min, s_max, predictor, corrector, variant, mode)
