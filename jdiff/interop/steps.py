"""Steps of diffusers' solvers that ours take otherwise, from ours.

Its multistep solvers lower their order at the end of a grid (`LowerOrderFinal`, `FinalUniPC`), its
DPM-Solver of order 3 has half the second derivative and an order of 2 of its own on the way up
(`ThirdOrder`), and its singlestep solver takes the inner stages from the grid (`Singlestep`).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule
from jdiff.solvers import phi
from jdiff.solvers.base import Solver
from jdiff.solvers.dpmpp import DPMpp3MPublished
from jdiff.solvers.exponential import ddim_update
from jdiff.solvers.multistep import History
from jdiff.solvers.singlestep import refined
from jdiff.solvers.unipc import UniPC

#: diffusers lowers the order at the end of grids of fewer steps than this.
SHORT = 15


@struct
class LowerOrderFinal(Solver):
    """A multistep solver whose last steps forget: the last is of order 1, the one before of 2.

    Attributes:
      inner: the solver; its memory is a `History`.
      short: whether that holds on grids of fewer than 15 steps (lower_order_final).
      euler: whether the last step is of order 1 on any grid (euler_at_final).
      dropped: how many steps of no length the grid leaves out at its end.
    """

    inner: Solver
    short: bool = static(True)
    euler: bool = static(False)
    dropped: int = static(0)

    @property
    def order(self) -> int:
        """The solver's."""
        return self.inner.order

    @property
    def evaluations(self) -> int:
        """The solver's."""
        return self.inner.evaluations

    def init(self, x: PyTree, times: Array) -> tuple[History, Array, bool]:
        """The solver's memory, and the steps left as diffusers counts them."""
        n = len(times) - 1 + self.dropped
        lowered = self.short and n < SHORT
        return self.inner.init(x, times), jnp.asarray(n), jnp.asarray(lowered)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: tuple, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, tuple, Prediction]:  # fmt: skip
        """The solver's, with no more of its history than it may use."""
        history, left, lowered = memory
        use = jnp.where(lowered, left - 1, history.count)
        use = jnp.where((left == 1) & (lowered | self.euler), 0, use)
        known = history._replace(count=jnp.minimum(history.count, use))
        x, after, prediction = self.inner.step(denoise, schedule, x, known, t, s, noise, cond)
        after = after._replace(count=history.count + 1)
        return x, (after, left - 1, lowered), prediction


@struct
class FinalUniPC(UniPC):
    """UniPC whose order is at most the number of steps left: lower_order_final.

    Attributes:
      left: the number of steps left; set in each step.
    """

    left: Array | int = 0

    def init(self, x: PyTree, times: Array) -> tuple[History, Array]:
        """An empty history, and the number of steps."""
        return UniPC.init(self, x, times), jnp.asarray(len(times) - 1)

    def predictor(self, sched: Schedule, history: History, t: Array, s: Array) -> list[Array]:
        """Of order `left` at most."""
        return UniPC.predictor(self, sched, self._last(history, self.left - 1), t, s)

    def corrector(self, sched: Schedule, history: History, t: Array) -> list[Array]:
        """That of the step before, when one more was left."""
        return UniPC.corrector(self, sched, self._last(history, self.left + 1), t)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: tuple, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, tuple, Prediction]:  # fmt: skip
        """UniPC's."""
        history, left = memory
        now = dataclasses.replace(self, left=left)
        x, history, prediction = UniPC.step(
            now, denoise, schedule, x, history, t, s, noise, cond
        )  # fmt: skip
        return x, (history, left - 1), prediction

    def _last(self, history: History, count: Array) -> History:
        return history._replace(count=jnp.minimum(history.count, count))


@struct
class ThirdOrder(DPMpp3MPublished):
    """diffusers' solver_order=3: `dpmpp_3m_published`, in eps too, with a choice of second step.

    Attributes:
      of: "x0" ("dpmsolver++") or "eps" ("dpmsolver").
      kind: the solver of order 2: "midpoint" or "heun" (its integrals exact).
    """

    of: str = static("x0")
    kind: str = static("midpoint")

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """The published ones; those of order 2 where one node is known."""
        if len(nodes) == 1 and self.kind == "midpoint":
            return phi.midpoint(z, nodes)
        return DPMpp3MPublished.weights(self, z, nodes)


@struct
class Singlestep(Solver):
    """DPM-Solver of order 2 whose inner stages are times of the grid: one evaluation a time.

    Every second step starts anew from where the one before it started. Of an even number of steps
    the last two are of order 1 each, as a grid that ends at the data needs.

    Attributes:
      of: "x0" ("dpmsolver++") or "eps" ("dpmsolver").
      kind: "midpoint" or "heun".
      even: whether that is so (lower_order_final).
    """

    of: str = static("x0")
    kind: str = static("midpoint")
    even: bool = static(True)

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def init(self, x: PyTree, times: Array) -> tuple[PyTree, Array, Array, Array]:
        """The prediction and time of a stage, its number, and the number of second orders."""
        n = len(times) - 1
        blank = jax.tree.map(jnp.zeros_like, x)
        pairs = (n - 1) // 2 if self.even else n // 2
        return (blank, blank), jnp.asarray(times[0]), jnp.asarray(0), jnp.asarray(pairs)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: tuple, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, tuple, Prediction]:  # fmt: skip
        """DDIM's, or the step from the time before refined by the prediction here."""
        (x0, eps), base, i, pairs = memory
        prediction = denoise(x, broadcast_time(t, x), cond)
        weights = phi.midpoint if self.kind == "midpoint" else phi.adams
        start = Prediction(x0, eps)
        second = (i % 2 == 1) & (i < 2 * pairs)
        x_next = jax.lax.cond(
            second,
            lambda: refined(schedule, weights, self.of, start, prediction, base, t, s),
            lambda: ddim_update(schedule, prediction, s),
        )
        kept = (prediction.x0, prediction.eps)
        return x_next, (kept, jnp.asarray(t, base.dtype), i + 1, pairs), prediction
