"""What multistep exponential integrators share: DDIM's step plus differences to past predictions.

    x_s = alpha_s x0 + sigma_s eps + sum_j c_j (y_j - y)

with y = x0 or eps at (x_t, t), y_j the same j steps ago, and scalars c_j that alone tell methods
apart: one pass over the batch, one evaluation a step, one stored prediction per order above 1.

The order rises with the history: a first step is DDIM's, whatever follows. So is a step to
sigma = 0, one next to alpha = 0 (its length in lambda is infinite), and one after a step of no
length. A first step of length h has an error of h^2 of its own: on a grid whose first step is as
long as the others, a method of order 3 or more converges with order 2 in the end. On the grids in
use it is the constant that counts, since x0 hardly changes where they start.

The differences vanish with a constant y, so predictions whose x0 and eps do not belong together
(CFG++) are served: the step is alpha_s x0 + sigma_s eps with the slopes of y.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, struct
from jdiff.schedules import Schedule, schedule_map
from jdiff.solvers.base import Solver

#: (z, nodes) -> the weights of `phi`'s docstring.
Weights = Callable[[Array, list[Array]], list[Array]]


class History(NamedTuple):
    """Predictions of earlier steps, the latest first; only the first `count` of them were made."""

    values: tuple[PyTree, ...]
    times: tuple[Array, ...]
    count: Array


class Nodes(NamedTuple):
    """Where earlier predictions lie, in units of the step: 0 is its start, 1 its end."""

    at: list[Array]  # negative; a harmless number where not usable
    usable: list[Array]  # falling: True for as many as can be interpolated
    h: Array  # the step's length in lambda, 0 where it is infinite


def nodes_of(
    sched: Schedule, s: Array, t: Array, earlier: tuple[Array, ...], count: Array
) -> Nodes:
    """The nodes of a step from t to s. One is usable if all steps since have a finite length."""
    lam_s, *lams = (0.5 * sched.logsnr(a) for a in (s, t, *earlier))
    h = lam_s - lams[0]
    at, usable, node, ok = [], [], jnp.zeros_like(h), jnp.isfinite(h)
    for j in range(len(earlier)):
        r = (lams[j] - lams[j + 1]) / h
        ok = ok & (count > j) & (r > 0) & jnp.isfinite(r)
        node = node - jnp.where(ok, r, 1.0)
        at.append(node)
        usable.append(ok)
    return Nodes(at, usable, jnp.where(jnp.isfinite(h), h, 0.0))


def ramped(weights: Weights, z: Array, nodes: Nodes) -> list[Array]:
    """The weights of the usable nodes, 0 for the others."""
    chosen = [jnp.zeros_like(z)] * len(nodes.at)
    for k, ok in enumerate(nodes.usable, 1):
        new = [*weights(z, nodes.at[:k]), *chosen[k:]]
        chosen = [jnp.where(ok, a, b) for a, b in zip(new, chosen)]
    return chosen


@struct
class Multistep(Solver):
    """A method is its `weights`, how many earlier predictions it has, and of what they are."""

    evaluations: ClassVar[int] = 1
    of: ClassVar[str] = "x0"

    @property
    def length(self) -> int:
        """How many earlier predictions are kept."""
        return self.order - 1

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """One a node, for 1 to `length` nodes; see `phi`."""
        raise NotImplementedError  # abstract

    def coefficients(self, sched: Schedule, history: History, t: Array, s: Array) -> list[Array]:
        """c_j of the module's docstring: scalars."""
        nodes = nodes_of(sched, s, t, history.times, history.count)
        z, lead = (-nodes.h, sched.alpha(s)) if self.of == "x0" else (nodes.h, sched.sigma(s))
        return [-lead * z * w for w in ramped(self.weights, z, nodes)]

    def init(self, x: PyTree, times: Array) -> History:
        """An empty history."""
        blank = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        values = (jax.tree.map(blank, x),) * self.length
        return History(values, (jnp.asarray(times)[0],) * self.length, jnp.asarray(0))

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: History, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, History, Prediction]:  # fmt: skip
        """The module's formula."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        y = getattr(prediction, self.of)

        def update(sched: Schedule, x0: Array, eps: Array, y: Array, *earlier: Array) -> Array:
            x_next = sched.alpha(s) * x0 + sched.sigma(s) * eps
            for c, value in zip(self.coefficients(sched, memory, t, s), earlier):
                x_next = x_next + c * (value - y)
            return x_next

        x_next = schedule_map(update, schedule, prediction.x0, prediction.eps, y, *memory.values)
        return x_next, remember(memory, y, t), prediction


def remember(history: History, value: PyTree, t: Array) -> History:
    """The history with one more prediction, without its oldest."""
    if not history.values:
        return history
    value = jax.tree.map(lambda a, old: a.astype(old.dtype), value, history.values[0])
    times = (jnp.asarray(t, history.times[0].dtype), *history.times)
    return History((value, *history.values)[:-1], times[:-1], history.count + 1)
