"""Time grids: the falling times that a solver visits, `[n + 1]` values for n steps.

Every grid starts at `first` (the schedule's t_max unless given) and ends at the data,
`schedule.t_data`, where no denoiser is evaluated: n steps ask for the denoiser at the first n
values. A grid is an array like any other: slice it to start half-way, or write your own.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, is_concrete
from jdiff.schedules import Schedule
from jdiff.schedules import first as first_schedule


def uniform(
    schedule: PyTree, n: int, first: float | None = None, last: float | None = None
) -> Array:
    """Evenly spaced in t, from `first` to the data; with `last`, to `last` and then the data.

    uniform(rectified_flow(), 4) is 1, 0.75, 0.5, 0.25, 0. EDM's table 1 spaces its VP and VE
    columns with `last`: uniform(vp_linear(), n, last=1e-3).
    """
    s = _start(schedule, n)
    first = s.t_max if first is None else first
    if last is None:
        return jnp.linspace(first, s.t_data, n + 1)
    return _to_data(s, jnp.linspace(first, last, n))


def uniform_logsnr(
    schedule: PyTree, n: int, first: float | None = None, last: float | None = None
) -> Array:
    """Evenly spaced in logSNR from `first` to `last` (t_max and t_min unless given), then the data.

    Raises:
      UserError: the logSNR is infinite at an end (rectified flow's t = 0 and 1): give it inside.
    """
    s = _start(schedule, n)
    ends = _finite(s, "uniform_logsnr", first, last)
    return _to_data(s, s.time(jnp.linspace(*ends, n)))


def karras(
    schedule: PyTree,
    n: int,
    rho: float = 7.0,
    first: float | None = None,
    last: float | None = None,
) -> Array:
    """Evenly spaced in (sigma / alpha)^(1 / rho), then the data (Karras et al. 2022, equation 5).

    The ends are the schedule's t_max and t_min unless given. n = 18 for CIFAR-10 in the paper.
    """
    s = _start(schedule, n)
    ends = _finite(s, "karras", first, last)
    high, low = (jnp.exp(-0.5 * end) ** (1.0 / rho) for end in ends)
    return _to_data(s, s.time(-2.0 * rho * jnp.log(jnp.linspace(high, low, n))))


def leading(schedule: PyTree, n: int, offset: int = 0) -> Array:
    """A discrete table's steps 0, T // n, 2 (T // n), ... from their start, plus `offset`.

    In the index of diffusers and DDPM's code (our t - 1): 900, 800, ..., 0 for n = 10, T = 1000.
    """
    T = _table("leading", schedule, n)
    return _steps([1 + offset + i * (T // n) for i in reversed(range(n))])


def trailing(schedule: PyTree, n: int) -> Array:
    """A discrete table's steps T, T - T / n, ... from their end, rounded.

    In the index of diffusers (our t - 1): 999, 899, ..., 99 for n = 10. The spacing that starts at
    pure noise (Lin et al. 2023), so the one for a zero terminal SNR.
    """
    T = _table("trailing", schedule, n)
    return _steps([round(T - i * T / n) for i in range(n)])


def linspace(schedule: PyTree, n: int) -> Array:
    """A discrete table's steps from T to 1, both included, evenly spaced and rounded.

    In the index of diffusers (our t - 1): 999, 888, ..., 0 for n = 10.
    """
    T = _table("linspace", schedule, n)
    # One division of integers: halves stay halves, and round to even as in numpy.
    return _steps([1 + round((T - 1) * (n - 1 - i) / (n - 1)) for i in range(n)] if n > 1 else [T])


#: Grids by name, as the command line offers them: (schedule, n) -> times.
BY_NAME: dict[str, Callable[..., Any]] = {
    "uniform": uniform,
    "uniform_logsnr": uniform_logsnr,
    "karras": karras,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}


def check(times: Array, schedule: PyTree) -> Array:
    """`times` as an array, after checking (where it has values) that a solver can follow it.

    Raises:
      UserError: not one axis of two or more, not finite, not falling, or outside the domain.
    """
    times = jnp.asarray(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise UserError(f"times: at least two values in one axis are needed, given {times.shape}.")
    s = first_schedule(schedule)
    if not is_concrete((times, schedule)):
        return times
    for i, (t, after) in enumerate(zip(times.tolist(), times.tolist()[1:])):
        if not t > after:
            raise UserError(
                f"times must fall: times[{i}]={t:.6g} is followed by times[{i + 1}]={after:.6g}."
            )
    start, top = float(times[0]), float(s.t_max)
    if start > top * (1 + 1e-5) or float(times[-1]) < s.t_data:
        raise UserError(
            f"times run from {start:.6g} to {float(times[-1]):.6g}; {type(s).__name__} allows "
            f"{top:.6g} down to {s.t_data:.6g}. Was the grid made for another schedule?"
        )
    return times


def _start(schedule: PyTree, n: int) -> Schedule:
    if n < 1:
        raise UserError(f"n={n} steps given; a grid needs at least 1.")
    return first_schedule(schedule)


def _to_data(schedule: Schedule, times: Array) -> Array:
    return jnp.concatenate([times, jnp.full((1,), schedule.t_data, times.dtype)])


def _finite(s: Schedule, where: str, first: Any, last: Any) -> tuple[Array, Array]:
    times = {
        "first": s.t_max if first is None else first,
        "last": s.t_min if last is None else last,
    }
    ends = {name: s.logsnr(t) for name, t in times.items()}
    for name, end in ends.items():
        if is_concrete(end) and not jnp.isfinite(end):
            raise UserError(
                f"{where}: the logSNR of {type(s).__name__} is {float(end)} at t={times[name]}; "
                f"give {name}= inside ({s.t_data:g}, {float(s.t_max):g}), e.g. "
                f"{'first=0.999' if name == 'first' else 'last=0.001'}."
            )
    return ends["first"], ends["last"]


def _table(where: str, schedule: PyTree, n: int) -> int:
    s = _start(schedule, n)
    if s.T is None:
        raise UserError(
            f"{where}: spaces the steps of a discrete table (ddpm_linear), given "
            f"{type(s).__name__}; for a continuous schedule use grids.uniform."
        )
    if n > s.T:
        raise UserError(f"{where}: n={n} steps given, the table has T={s.T}.")
    return s.T


def _steps(steps: list[int]) -> Array:
    return jnp.asarray([*steps, 0], jnp.result_type(float))
