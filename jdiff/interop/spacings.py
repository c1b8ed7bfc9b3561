"""The times at which diffusers' schedulers ask the network, as grids of jdiff.

Each class is a grid: called with a schedule and a number of steps it gives the falling times. They
are made in float64 from a scheduler's config; grids under their own names are in `jdiff.grids`.

Times where diffusers takes a last step of no length (sigma_min after sigma_min) leave it out.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jdiff import grids
from jdiff.errors import UserError
from jdiff.pytree import Array
from jdiff.schedules import Schedule

#: Where a step to sigma = 0 ends that is a step as any other: nearer to the data than a float32
#: tells, in the steps of a table.
NEARLY_DATA = 1e-7


@dataclasses.dataclass(frozen=True)
class TableGrid:
    """Steps of a discrete table, or noise levels between them.

    Attributes:
      style: "ddim" (n whole steps), "euler" (n steps, linspace's not rounded and sigma linear
        between steps) or "dpm" (n of n + 1 whole steps).
      spacing: "leading", "trailing" or "linspace".
      offset: added to the steps of "leading".
      levels: None, or what is spaced between the ends of the noise levels: "karras",
        "exponential", "beta" or "lu". In "euler" the ends are those of the steps, in "dpm" those
        of the table.
      ends: the lowest and the highest level, if not those.
      top: the step after the highest, if not T (DPM-Solver's lambda_min_clipped).
      final: where the last step ends: "zero" (the data), "sigma_min" (the table's lowest level) or
        "nearly_zero".
    """

    style: str
    spacing: str
    offset: int = 0
    levels: str | None = None
    ends: tuple[float, float] | None = None
    top: int | None = None
    final: str = "zero"

    def __call__(self, schedule: Schedule, n: int) -> Array:
        """The times `[n + 1]`."""
        index = self._index(schedule.T, n)
        last = {"zero": 0.0, "sigma_min": 1.0, "nearly_zero": NEARLY_DATA}[self.final]
        if self.levels is None and (self.style != "euler" or np.all(index == np.round(index))):
            return _ended(index + 1.0, last)
        sigma = np.exp(-0.5 * np.asarray(schedule.table, np.float64))
        steps = np.arange(schedule.T)
        inside = np.interp(index, steps, sigma)
        if self.levels is not None:
            low, high = (inside[-1], inside[0]) if self.style == "euler" else (sigma[0], sigma[-1])
            low, high = self.ends or (low, high)
            inside = spaced(self.levels, high, low, n)
        return _ended(1.0 + np.interp(np.log(inside), np.log(sigma), steps), last)

    def _index(self, T: int, n: int) -> np.ndarray:
        """`[n]` falling indices of the table from 0."""
        if n < 1:
            raise UserError(f"n={n} steps given; a grid needs at least 1.")
        top, m = self.top or T, n + (self.style == "dpm")
        if self.spacing == "trailing":
            index = np.arange(top, 0, -T / n)[:n].round() - 1
        elif self.spacing == "leading":
            index = (np.arange(m) * (top // m))[::-1][:n] + self.offset
        else:
            index = np.linspace(0, top - 1, m)[::-1][:n]
            index = index if self.style == "euler" else index.round()
        if n > T or np.any(np.diff(index) >= 0) or index[0] > T - 1 or index[-1] < 0:
            raise UserError(
                f"n={n} steps given; with timestep_spacing={self.spacing!r} and "
                f"steps_offset={self.offset} a table of {T} steps has no such grid; take fewer."
            )
        return index.astype(float)


@dataclasses.dataclass(frozen=True)
class DistilledGrid:
    """n of the steps on which a latent consistency model was distilled, evenly from the first.

    Attributes:
      steps: original_inference_steps, the number of those steps.
    """

    steps: int = 50

    def __call__(self, schedule: Schedule, n: int) -> Array:
        """The times `[n + 1]`."""
        if not 1 <= n <= self.steps:
            raise UserError(f"n={n} steps given; the model was distilled on {self.steps} steps.")
        known = np.arange(self.steps, 0, -1) * (schedule.T // self.steps)
        picked = np.floor(np.linspace(0, self.steps, n, endpoint=False)).astype(int)
        return _ended(known[picked].astype(float), 0.0)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A shift that depends on the image's size: linear in its tokens from `base` to `most`.

    kind="exponential": the shift is exp(mu) (FLUX, Qwen-Image); "linear": it is mu.
    """

    base: float = 0.5
    most: float = 1.15
    base_tokens: int = 256
    most_tokens: int = 4096
    kind: str = "exponential"

    def shift(self, tokens: int | None) -> float:
        """The shift for an image of so many tokens."""
        if tokens is None:
            raise UserError(
                "times: this scheduler shifts times by the image's size (use_dynamic_shifting); "
                "give tokens=, the number of patches, e.g. (height // 16) * (width // 16)."
            )
        slope = (self.most - self.base) / (self.most_tokens - self.base_tokens)
        mu = self.base + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.kind == "exponential" else mu


@dataclasses.dataclass(frozen=True)
class FlowGrid:
    """Shifted times on [0, 1], as FlowMatchEulerDiscrete has them.

    Attributes:
      shift: a number, or `Dynamic`.
      lowest: the last time before the shift: "table" (1 / T, shifted a first time where the shift
        is a number, as diffusers does without `sigmas`) or "even" (1 / n, as the pipelines of FLUX,
        Qwen-Image and Z-Image ask for).
      T: num_train_timesteps.
      terminal: where the last time is stretched to, or None.
      levels: None, or what is spaced between the ends: "karras", "exponential", "beta".
    """

    shift: float | Dynamic = 1.0
    lowest: str = "table"
    T: int = 1000
    terminal: float | None = None
    levels: str | None = None

    def __call__(self, schedule: Schedule, n: int, tokens: int | None = None) -> Array:
        """The times `[n + 1]`; `tokens` is needed where the shift depends on them."""
        if n < 1:
            raise UserError(f"n={n} steps given; a grid needs at least 1.")
        fixed = not isinstance(self.shift, Dynamic)
        s = self.shift if fixed else self.shift.shift(tokens)
        low = {"table": 1.0 / self.T, "even": 1.0 / n}[self.lowest]
        low = _shifted(low, s) if fixed and self.lowest == "table" else low
        times = _shifted(np.linspace(1.0, low, n), s)
        if self.terminal:
            times = 1.0 - (1.0 - times) * (1.0 - self.terminal) / (1.0 - times[-1])
        if self.levels is not None:
            times = spaced(self.levels, times[0], times[-1], n)
        return _ended(times, 0.0)


@dataclasses.dataclass(frozen=True)
class FlowSteps:
    """Times on [0, 1] of the DPM-Solver family's use_flow_sigmas.

    Attributes:
      style: "dpm" (from 1 - 1 / T evenly towards 0) or "unipc" (from 1 - 1e-6 towards 1 / T).
      shift: a number.
      T: num_train_timesteps.
      terminal: where the last time is stretched to, or None.
      final: "zero" (the data), or "stay": where it is.
    """

    style: str
    shift: float = 1.0
    T: int = 1000
    terminal: float | None = None
    final: str = "zero"

    def __call__(self, schedule: Schedule, n: int) -> Array:
        """The times `[n + 1]`."""
        if n < 1:
            raise UserError(f"n={n} steps given; a grid needs at least 1.")
        if self.style == "dpm":
            times = np.linspace(0.0, 1.0 - 1.0 / self.T, n + 1)[::-1][:-1]
        else:
            times = np.linspace(1.0, 1.0 / self.T, n + 1)[:-1]
        times = _shifted(times, self.shift)
        if self.terminal:
            times = 1.0 - (1.0 - times) * (1.0 - self.terminal) / (1.0 - times[-1])
        if self.style == "unipc" and abs(times[0] - 1.0) < 1e-6:
            times[0] -= 1e-6  # its logarithms need some signal
        return _ended(times, 0.0 if self.final == "zero" else times[-1])


@dataclasses.dataclass(frozen=True)
class LevelGrid:
    """Noise levels from `high` to `low` on any schedule that has them, and then the data or not.

    Attributes:
      levels: "karras" or "exponential".
      rho: of "karras".
      final: "zero" or "sigma_min".
    """

    levels: str
    low: float
    high: float
    rho: float = 7.0
    final: str = "zero"

    def __call__(self, schedule: Schedule, n: int) -> Array:
        """The times `[n + 1]`, or `[n]`."""
        ends = [schedule.time(-2.0 * jnp.log(sigma)) for sigma in (self.high, self.low)]
        if self.levels == "karras":
            times = grids.karras(schedule, n, self.rho, *ends)
        else:
            times = grids.uniform_logsnr(schedule, n, *ends)
        return times if self.final == "zero" else times[:-1]


def spaced(levels: str, high: float, low: float, n: int, rho: float = 7.0) -> np.ndarray:
    """n levels from high to low: diffusers' use_karras_sigmas and its relatives, in float64."""
    if levels == "karras":
        return np.linspace(high ** (1.0 / rho), low ** (1.0 / rho), n) ** rho
    if levels == "beta":
        from scipy.special import betaincinv

        return low + (high - low) * betaincinv(0.6, 0.6, np.linspace(1.0, 0.0, n))
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def _shifted(t: np.ndarray | float, shift: float) -> np.ndarray | float:
    return shift * t / (1.0 + (shift - 1.0) * t)


def _ended(times: np.ndarray, last: float) -> Array:
    """`times` and then `last`, once; rounding does not make a step of what has no length."""
    ahead = times[times > last + 1e-6 * (1.0 + last)]
    if not len(ahead):
        raise UserError(f"the only step of this grid starts where it ends, at t={last:g}.")
    return jnp.asarray([*ahead, last], jnp.result_type(float))
