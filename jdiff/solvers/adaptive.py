"""Adaptive Runge-Kutta methods: each interval of the grid is solved to a tolerance, by diffrax.

Every sample has its own steps, so that its result and its number of evaluations depend on no other
sample; the denoiser is still called on the whole batch, each sample at its own time, until the last
one is there. In float32, rounding may decide whether a step is accepted: between batch sizes a
sample then agrees to the tolerance, not to the bit. Forward-mode derivatives pass through, reverse
mode does not.
"""

from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError, choose
from jdiff.noise import Fresh, Noise
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, batch_size, broadcast_time, expand, static, struct
from jdiff.schedules import first, is_schedule, schedule_map
from jdiff.solvers.base import Solver, ends_at_data
from jdiff.solvers.variables import VARIABLES, finite_velocity, slope

#: Name -> (class in diffrax, order, evaluations before the first step and in each).
METHODS = {
    "heun": ("Heun", 2, 0, 2), "bosh3": ("Bosh3", 3, 1, 3), "tsit5": ("Tsit5", 5, 1, 6),
    "dopri5": ("Dopri5", 5, 1, 6), "dopri8": ("Dopri8", 8, 1, 13),
}  # fmt: skip


@struct
class _Field:
    """dy/du for a batch, each sample at its own u: y = x and u = t, or both over alpha."""

    denoise: Any
    schedule: PyTree
    cond: PyTree
    variable: str = static()

    def __call__(self, u: Array, y: PyTree) -> PyTree:
        """u `[B]`, y a tree of `[B, ...]`."""
        t, x = u, y
        if self.variable == "sigma":
            t = first(self.schedule).time(-2.0 * jnp.log(u)).astype(u.dtype)
            x = schedule_map(lambda s, y: expand(s.alpha(t), y) * y, self.schedule, y)
        d = slope(self.variable, self.schedule, self.denoise(x, t, self.cond), t)
        return jax.tree.map(lambda d, y: d.astype(y.dtype), d, y)


@custom_vmap
def _together(field: _Field, u: Array, y: PyTree) -> PyTree:
    """One sample's dy/du. Mapped over samples it is one call of the field on all of them.

    A plain vmap would call the denoiser on batches of one, which the numbers of a sample inside a
    denoiser (a guidance scale `[B]`) do not fit.
    """
    return y  # never reached unmapped: says the shape


@_together.def_vmap
def _(size: int, mapped: Any, field: _Field, u: Array, y: PyTree) -> tuple[PyTree, PyTree]:
    every = lambda a, m: a if m else jnp.broadcast_to(a, (size, *jnp.shape(a)))
    out = field(every(u, mapped[1]), jax.tree.map(every, y, mapped[2]))
    return out, jax.tree.map(lambda _: True, out)


@struct
class Adaptive(Solver):
    """One of `METHODS` with step control; the memory is the number of evaluations `[B]`."""

    rtol: Array | float
    atol: Array | float
    method: str = static()
    variable: str = static()
    most: int = static()

    evaluations: ClassVar[int | None] = None

    @property
    def order(self) -> int:
        """The method's."""
        return METHODS[self.method][1]

    def check(self, schedule: PyTree, times: Array) -> None:
        """Refuses an infinite velocity, or an infinite interval or several in "sigma"; diffrax."""
        _diffrax()
        if self.variable == "t":
            finite_velocity("adaptive", schedule, times)
            return
        if len(jax.tree.leaves(schedule, is_leaf=is_schedule)) > 1:
            raise UserError(
                "adaptive: variable='sigma' is one sigma / alpha for all of x, whose leaves have "
                "schedules of their own. Use variable='t'."
            )
        if not jnp.isfinite(first(schedule).sigma_ratio(times[0])):
            raise UserError(
                f"adaptive: sigma / alpha is infinite at times[0]={float(times[0]):.6g}. Start "
                "below it or use variable='t'."
            )

    def count(self, steps: int) -> None:
        """None: it depends on the sample; see `adaptive_count`."""

    def init(self, x: PyTree, times: Array) -> Array:
        """No evaluations yet, `[B]`."""
        return jnp.zeros(batch_size(x), jnp.int32)

    def step(
        self, denoise: Any, schedule: PyTree, x: PyTree, memory: Array, t: Array, s: Array,
        noise: Noise, cond: PyTree,
    ) -> tuple[PyTree, Array, Prediction]:  # fmt: skip
        """The ODE from t to s, to the tolerance; NaN for a sample that needs more than `most`."""
        prediction = denoise(x, broadcast_time(t, x), cond)
        x = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), x)

        def to_data() -> tuple[PyTree, Array]:
            arrive = lambda sched, x0, x: jnp.where(t == s, x, sched.alpha(s) * x0).astype(x.dtype)
            return schedule_map(arrive, schedule, prediction.x0, x), jnp.zeros_like(memory)

        def solve() -> tuple[PyTree, Array]:
            return self._solve(_Field(denoise, schedule, cond, self.variable), x, t, s)

        x_next, calls = jax.lax.cond(ends_at_data(schedule, s) | (t == s), to_data, solve)
        return x_next, memory + 1 + calls, prediction

    def _solve(self, field: _Field, x: PyTree, t: Array, s: Array) -> tuple[PyTree, Array]:
        """(x at s, evaluations `[B]`)."""
        diffrax, (name, _, start, each) = _diffrax(), METHODS[self.method]
        ends = (t, s)
        if self.variable == "sigma":
            ends = tuple(first(field.schedule).sigma_ratio(a) for a in ends)
            x = schedule_map(
                lambda sched, x: (x / sched.alpha(t)).astype(x.dtype), field.schedule, x
            )

        def one(x: PyTree) -> tuple[PyTree, Array]:
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda u, y, field: _together(field, u, y)),
                getattr(diffrax, name)(), *ends, 0.05 * (ends[1] - ends[0]), x, args=field,
                stepsize_controller=diffrax.PIDController(self.rtol, self.atol),
                adjoint=diffrax.ForwardMode(), max_steps=self.most, throw=False,
            )  # fmt: skip
            done = found.result == diffrax.RESULTS.successful
            end = jax.tree.map(lambda a: jnp.where(done, a[0], jnp.nan), found.ys)
            return end, found.stats["num_steps"]

        x, steps = jax.vmap(one)(x)
        if self.variable == "sigma":
            x = schedule_map(
                lambda sched, x: (x * sched.alpha(s)).astype(x.dtype), field.schedule, x
            )
        return x, (start + each * steps).astype(jnp.int32)


def adaptive(
    method: str = "tsit5", rtol: Array | float = 1e-4, atol: Array | float = 1e-4,
    variable: str = "t", most: int = 4096,
) -> Adaptive:  # fmt: skip
    """An embedded Runge-Kutta method with step control, by diffrax (pip install 'jdiff[solvers]').

    A grid of three values is enough: [t_max, t_min, t_data]. Each interval but the last is solved
    to the tolerance; the last step returns the predicted x0.

    Args:
      method: "heun", "bosh3", "tsit5", "dopri5" (of Song et al. 2021) or "dopri8".
      rtol, atol: the error of a step stays below atol + rtol |x|, as a root mean square over x.
        float32 cannot follow tolerances much below 1e-6.
      variable: "t" or "sigma", where x / alpha is what the tolerances are about.
      most: steps that a sample may take in an interval; one that needs more is NaN.

    Raises:
      UserError: an unknown method or variable, a tolerance that is not positive, no diffrax.
    """
    choose("adaptive: method", method, METHODS)
    choose("solver variable", variable, VARIABLES)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"adaptive: {name}={value} given; it must be positive.")
    return Adaptive(rtol, atol, method, variable, most)


def adaptive_count(
    denoiser: Any, x: PyTree, times: Array, cond: PyTree = None, schedule: PyTree = None,
    solver: Adaptive | None = None,
) -> Array:  # fmt: skip
    """How many evaluations each sample takes from x at times[0], `[B]`.

    The batch's calls are as many as those of its slowest sample in each interval.
    """
    denoiser = as_denoiser(denoiser)
    schedule = schedule_of(denoiser, schedule, "adaptive_count")
    return _count(adaptive() if solver is None else solver, denoiser, schedule, x, times, cond)


@jax.jit
def _count(
    solver: Adaptive, denoise: Any, schedule: PyTree, x: PyTree, times: Array, cond: PyTree
) -> Array:
    def body(carry: tuple, ends: Array) -> tuple:
        x, memory = carry
        x_next, memory, _ = solver.step(denoise, schedule, x, memory, *ends, Fresh(), cond)
        return (jax.tree.map(lambda a, old: a.astype(old.dtype), x_next, x), memory), None

    ends = jnp.stack([times[:-1], times[1:]], 1)
    return jax.lax.scan(body, (x, solver.init(x, times)), ends)[0][1]


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise UserError("adaptive: needs diffrax; pip install 'jdiff[solvers]'.") from error
    return diffrax
