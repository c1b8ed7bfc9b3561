"""What every grid is made with: the ends, the check, and grids made from grids."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, is_concrete
from jdiff.schedules import Schedule, is_schedule
from jdiff.schedules import first as first_schedule

#: (schedule, n) -> the falling times `[n + 1]`.
Grid = Callable[[PyTree, int], Array]


def check(times: Array, schedule: PyTree) -> Array:
    """`times` as an array, after checking (where it has values) that a solver can follow it.

    Raises:
      UserError: not one axis of two or more, not finite, not falling, or outside the domain.
    """
    times = jnp.asarray(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise UserError(f"times: at least two values in one axis are needed, given {times.shape}.")
    first_schedule(schedule)  # raises if there is none
    if not is_concrete((times, schedule)):
        return times
    schedules = [s for s in jax.tree.leaves(schedule, is_leaf=is_schedule) if is_schedule(s)]
    with jax.ensure_compile_time_eval():  # values are known here even while jit traces the caller
        values, tops = times.tolist(), [float(s.t_max) for s in schedules]
    for i, (t, after) in enumerate(zip(values, values[1:])):
        if not t > after:
            raise UserError(
                f"times must fall: times[{i}]={t:.6g} is followed by times[{i + 1}]={after:.6g}."
            )
    for s, top in zip(schedules, tops):
        if values[0] > top * (1 + 1e-5) or values[-1] < s.t_data:
            raise UserError(
                f"times run from {values[0]:.6g} to {values[-1]:.6g}; {type(s).__name__} allows "
                f"{top:.6g} down to {s.t_data:.6g}. Was the grid made for another schedule?"
            )
    return times


def custom(
    schedule: PyTree, *, times: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> Array:
    """A grid of your own: falling times, or levels sigma / alpha; the data is added if absent.

    Under jit, where values are not known, leave the data out.

    Raises:
      UserError: both or neither given, or what `check` refuses.
    """
    s = first_schedule(schedule)
    if (times is None) == (sigmas is None):
        raise UserError("custom: give times= (in the schedule's units) or sigmas= (sigma / alpha).")
    given, data = (times, s.t_data) if sigmas is None else (sigmas, 0.0)
    ended = is_concrete(given) and np.size(given) and float(np.asarray(given)[-1]) == data
    given = jnp.asarray(given, jnp.result_type(float))
    times = given if sigmas is None else s.time(-2.0 * jnp.log(given))
    return check(times if ended else to_data(s, times), schedule)


def tail(times: Array, strength: float) -> Array:
    """The last `strength` of a grid's steps, at least one: where image-to-image starts (SDEdit).

    `sample(..., x=corrupt(schedule, image, noise, times[0]), times=times)` goes on from there.
    diffusers' strength; for the same number of steps on less noise, see `img2img`.

    Raises:
      UserError: strength is not in (0, 1].
    """
    _share("tail", strength)
    steps = max(1, int((len(times) - 1) * strength))
    return times[-(steps + 1) :]


def img2img(schedule: PyTree, n: int, grid: Grid, strength: float) -> Array:
    """n steps that cover the last `strength` of a grid: that of n / strength steps, its tail.

    ComfyUI's denoise: img2img(schedule, 20, karras, 0.5) is the last 20 steps of 40.

    Raises:
      UserError: strength is not in (0, 1].
    """
    _share("img2img", strength)
    return grid(schedule, int(n / strength))[-(n + 1) :]


def round_steps(schedule: PyTree, times: Array) -> Array:
    """A grid on a discrete table, each time at its nearest step: for networks that know no other.

    Raises:
      UserError: not a table, or two times that round to one step: take fewer.
    """
    s = first_schedule(schedule)
    if s.T is None:
        raise UserError(f"round_steps: needs a discrete table, given {type(s).__name__}.")
    inside = 1 + jnp.clip(jnp.round(times[:-1] - 1), 0, s.T - 1)  # halves as in diffusers' index
    return check(to_data(s, inside), schedule)


def start(schedule: PyTree, n: int) -> Schedule:
    """The schedule a grid refers to, after checking the number of steps."""
    if n < 1:
        raise UserError(f"n={n} steps given; a grid needs at least 1.")
    return first_schedule(schedule)


def to_data(schedule: Schedule, times: Array) -> Array:
    """`times`, and then the data."""
    return jnp.concatenate([times, jnp.full((1,), schedule.t_data, times.dtype)])


def by_sigma(schedule: Schedule, sigma: Array) -> Array:
    """The times with these noise levels sigma / alpha, and then the data."""
    return to_data(schedule, schedule.time(-2.0 * jnp.log(sigma)))


def between(schedule: Schedule, first: Any, last: Any) -> tuple[Any, Any]:
    """(first, last), the schedule's t_max and t_min where not given."""
    return schedule.t_max if first is None else first, schedule.t_min if last is None else last


def finite(s: Schedule, where: str, first: Any, last: Any) -> tuple[Array, Array]:
    """The logSNR at both ends of a grid that is made in it.

    Raises:
      UserError: it is infinite.
    """
    times = dict(zip(("first", "last"), between(s, first, last)))
    ends = {name: s.logsnr(t) for name, t in times.items()}
    for name, end in ends.items():
        if is_concrete(end) and not jnp.isfinite(end):
            raise UserError(
                f"{where}: the logSNR of {type(s).__name__} is {float(end)} at t={times[name]}; "
                f"give {name}= inside ({s.t_data:g}, {float(s.t_max):g}), e.g. "
                f"{'first=0.999' if name == 'first' else 'last=0.001'}."
            )
    return ends["first"], ends["last"]


def _share(where: str, strength: float) -> None:
    if not 0.0 < strength <= 1.0:
        raise UserError(f"{where}: strength={strength} given; allowed are 0 < strength <= 1.")
