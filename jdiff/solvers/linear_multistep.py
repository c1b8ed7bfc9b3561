"""Linear multistep (Adams-Bashforth) methods on the probability-flow ODE, in sigma / alpha or in t.

A step follows the integral of the polynomial through the slopes at (x, t) and at earlier steps: one
evaluation a step, and one stored slope for each order above 1. `lms` integrates it over the grid as
it is; `plms`, `pndm` and `ipndm` use the weights of even steps on every grid (Liu et al. 2022,
2202.09778), which leaves second order however many slopes are used.

The first step has no history. Started with lower orders ("lower"), a first step of length h leaves
an error of h^2, which is what remains of the order unless the grid starts with shorter steps; a
Runge-Kutta start keeps the order.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.noise import Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, static, struct
from jdiff.schedules import Schedule
from jdiff.solvers.base import Solver
from jdiff.solvers.multistep import History, remember
from jdiff.solvers.ode import RungeKutta, heun, rk4
from jdiff.solvers.variables import VARIABLES, advance, finite_velocity, slope


@struct
class LinearMultistep(Solver):
    """One Adams-Bashforth method; see `lms` and `pndm` for the ones in use.

    Attributes:
      start: the one-step method of the first steps, or None: lower orders.
      order: of the global error; for `even` weights on smooth grids.
      length: how many slopes a step uses, 1 to 4.
      starts: how many steps `start` takes.
      variable: "t" or "sigma".
      even: whether the weights are those of even steps, whatever the grid.
    """

    start: RungeKutta | None
    order: int = static()
    length: int = static()
    starts: int = static()
    variable: str = static()
    even: bool = static()

    evaluations: ClassVar[int] = 1

    def check(self, schedule: PyTree, times: Array) -> None:
        """A finite velocity in "t", and what the method of the start needs."""
        if self.variable == "t":
            finite_velocity("solver", schedule, times)
        if self.start is not None:
            self.start.check(schedule, times)

    def count(self, steps: int) -> int:
        """One a step, and more for those of the start that do not end at the data."""
        extra = 0 if self.start is None else self.start.evaluations - 1
        return steps + extra * min(self.starts, steps - 1)

    def init(self, x: PyTree, times: Array) -> History:
        """An empty history."""
        blank = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        earlier = self.length - 1
        values = (jax.tree.map(blank, x),) * earlier
        return History(values, (jnp.asarray(times)[0],) * earlier, jnp.asarray(0))

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: History, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, History, Prediction]:  # fmt: skip
        """x + (s - t) sum_j w_j d_j, d_j the slope j steps ago."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        d = slope(self.variable, schedule, prediction, t)

        def multistep() -> PyTree:
            weights = lambda sched: self._weights(sched, memory, t, s)
            slopes = [d, *memory.values]
            return advance(self.variable, schedule, x, prediction, slopes, weights, t, s)

        def start() -> PyTree:
            return self.start.complete(denoise, schedule, x, prediction, t, s, cond)

        if self.start is None:
            x_next = multistep()
        else:
            x_next = jax.lax.cond(memory.count < self.starts, start, multistep)
        return x_next, remember(memory, d, t), prediction

    def _weights(self, sched: Schedule, memory: History, t: Array, s: Array) -> list[Array]:
        """Those of the earlier slopes; one at alpha = 0, or of a step of no length, ends them."""
        if self.even:
            known = [memory.count > j for j in range(len(memory.times))]
            return adams_weights(1.0, [-float(j + 1) for j in range(len(known))], known)
        place = (lambda t: t) if self.variable == "t" else sched.sigma_ratio
        u, *earlier = (place(a) for a in (t, *memory.times))
        h = place(s) - u
        nodes, usable, ok = [], [], jnp.asarray(True)
        for j, node in enumerate(earlier):
            last = nodes[-1] if nodes else 0.0
            # Where sigma / alpha is infinite the difference is too, or no number: not usable.
            distance = node - u
            ok = ok & (memory.count > j) & jnp.isfinite(distance) & (distance != last)
            nodes.append(jnp.where(ok, distance, last + 1.0))  # any other place: it has no weight
            usable.append(ok)
        return adams_weights(jnp.where(jnp.isfinite(h), h, 0.0), nodes, usable)


def adams_weights(h: Array, nodes: Sequence[Array | float], usable: Sequence[Array]) -> list[Array]:
    """The mean over [0, h] of the polynomial through slopes at 0 and `nodes`, as their weights.

    Only the leading nodes that are `usable` count, the others weigh 0; the slope at 0 has what is
    left to 1. In Newton's form: sum_k f[0, .., k] (1 / h) integral of prod_{i < k} (v - u_i), and
    the divided difference f[0, .., k] is sum_j f_j / prod_{i <= k, i != j} (u_j - u_i).
    """
    u = [0.0, *nodes]
    weights = [0.0] * len(u)
    product = [1.0]  # coefficients of prod_{i < k} (v - u_i), from v^0 up
    for k in range(1, len(u)):
        higher, lower = [0.0, *product], [*product, 0.0]
        product = [a - u[k - 1] * b for a, b in zip(higher, lower)]
        mean = sum(a * h**m / (m + 1) for m, a in enumerate(product))
        for j in range(1, k + 1):
            others = math.prod(u[j] - u[i] for i in range(k + 1) if i != j)
            weights[j] = weights[j] + jnp.where(usable[k - 1], mean / others, 0.0)
    return weights[1:]


def lms(order: int = 4, variable: str = "sigma", start: str = "lower") -> LinearMultistep:
    """Adams-Bashforth with the exact weights of an uneven grid, one evaluation a step.

    With the defaults, k-diffusion's sample_lms (there the weights are integrated by quadrature) but
    for the last step, which is exact here and an extrapolation to sigma = 0 there.

    Args:
      order: 1 to 4, the number of slopes.
      variable: "sigma" or "t" (flow matching).
      start: "lower" (first steps of lower order) or "runge_kutta" (order 4, three evaluations more
        in each of the first order - 1 steps).

    Raises:
      UserError: an order outside 1 to 4, an unknown variable or start.
    """
    choose("solver variable", variable, VARIABLES)
    choose("lms: start", start, ("lower", "runge_kutta"))
    _check_order("lms", order)
    begin = rk4(variable) if start == "runge_kutta" else None
    return LinearMultistep(begin, order, order, order - 1, variable, even=False)


def pndm() -> LinearMultistep:
    """F-PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps, then four slopes.

    Their transfer phi is the step in sigma / alpha, the weights on eps are those of even steps, and
    the stages of the start are half-way in t. n steps cost n + 9 evaluations; order 2, as proven.
    """
    return LinearMultistep(rk4("sigma", "time"), 2, 4, 3, "sigma", even=True)


def plms() -> LinearMultistep:
    """PLMS as in Stable Diffusion: `pndm` that starts with a Heun step and then lower orders.

    diffusers' PNDM with skip_prk_steps. n steps cost n + 1 evaluations; order 2.
    """
    return LinearMultistep(heun(variable="sigma"), 2, 4, 1, "sigma", even=True)


def ipndm(order: int = 4) -> LinearMultistep:
    """Improved PNDM (Zhang and Chen 2023, 2204.13902): `pndm` started by lower orders.

    `lms` is its form with the weights of an uneven grid (there called ipndm_v).

    Raises:
      UserError: an order outside 1 to 4.
    """
    _check_order("ipndm", order)
    return LinearMultistep(None, min(order, 2), order, order - 1, "sigma", even=True)


def _check_order(where: str, order: int) -> None:
    if order not in (1, 2, 3, 4):
        raise UserError(f"{where}: order={order} given; allowed are 1, 2, 3 and 4.")
