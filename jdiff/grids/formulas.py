"""Grids that are formulas: in t, in logSNR, in powers of sigma, by a density, from an optimum."""

import math

import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.grids.base import Grid, between, by_sigma, finite, start, to_data
from jdiff.pytree import Array, PyTree, is_concrete
from jdiff.schedules import shift_time, vp_linear
from jdiff.schedules.base import finite_data


def uniform(
    schedule: PyTree, n: int, first: float | None = None, last: float | None = None
) -> Array:
    """Evenly spaced in t, from `first` to the data; with `last`, to `last` and then the data.

    Where the data is at t = -inf, `last` is t_min unless given.

    uniform(rectified_flow(), 4) is 1, 0.75, 0.5, 0.25, 0. EDM's table 1 spaces its VP and VE
    columns with `last`: uniform(vp_linear(), n, last=1e-3).
    """
    s = start(schedule, n)
    first = s.t_max if first is None else first
    if last is None and not math.isinf(s.t_data):
        return jnp.linspace(first, s.t_data, n + 1)
    return to_data(s, jnp.linspace(first, s.t_min if last is None else last, n))


def uniform_logsnr(
    schedule: PyTree, n: int, first: float | None = None, last: float | None = None
) -> Array:
    """Evenly spaced in logSNR from `first` to `last` (t_max and t_min unless given), then the data.

    Raises:
      UserError: the logSNR is infinite at an end (rectified flow's t = 0 and 1): give it inside.
    """
    s = start(schedule, n)
    ends = finite(s, "uniform_logsnr", first, last)
    return to_data(s, s.time(jnp.linspace(*ends, n)))


def karras(
    schedule: PyTree,
    n: int,
    rho: float = 7.0,
    first: float | None = None,
    last: float | None = None,
) -> Array:
    """Evenly spaced in (sigma / alpha)^(1 / rho), then the data (Karras et al. 2022, equation 5).

    The ends are the schedule's t_max and t_min unless given. n = 18 for CIFAR-10 in the paper.

    Raises:
      UserError: rho is not positive; sigma / alpha is infinite or 0 at an end.
    """
    s = start(schedule, n)
    if is_concrete(rho) and not rho > 0:
        raise UserError(f"karras: rho={rho} given; it must be positive.")
    ends = finite(s, "karras", first, last)
    high, low = (jnp.exp(-0.5 * end) ** (1.0 / rho) for end in ends)
    return to_data(s, s.time(-2.0 * rho * jnp.log(jnp.linspace(high, low, n))))


def polyexponential(
    schedule: PyTree, n: int, rho: float = 1.0,
    first: float | None = None, last: float | None = None,
) -> Array:  # fmt: skip
    """log sigma along (1 - i / (n - 1))^rho between its ends, then the data (k-diffusion).

    rho = 1 is `uniform_logsnr`; above 1, more steps at low noise.
    """
    s = start(schedule, n)
    high, low = finite(s, "polyexponential", first, last)
    return to_data(s, s.time(low + (high - low) * jnp.linspace(1.0, 0.0, n) ** rho))


def vp(
    schedule: PyTree, n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3
) -> Array:
    """The noise levels of the VP SDE at even times from 1 to eps_s (Karras et al. 2022, table 1).

    sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), on any schedule that reaches them (152):
    k-diffusion's vp. On `vp_linear` itself it is uniform(schedule, n, last=1e-3).
    """
    s = start(schedule, n)
    path = vp_linear(beta_min, beta_min + beta_d, eps_s)
    return to_data(s, s.time(path.logsnr(jnp.linspace(1.0, eps_s, n))))


def kl_optimal(
    schedule: PyTree, n: int, sigma_data: float = 1.0,
    first: float | None = None, last: float | None = None,
) -> Array:  # fmt: skip
    """Evenly spaced in atan(sigma / sigma_data), then the data (Sabour et al. 2024, theorem 3.1).

    The grid that minimises the KL bound for Gaussian data of that deviation.
    """
    s = start(schedule, n)
    ends = finite(s, "kl_optimal", first, last)
    high, low = (jnp.arctan(jnp.exp(-0.5 * end) / sigma_data) for end in ends)
    return by_sigma(s, sigma_data * jnp.tan(jnp.linspace(high, low, n)))


def beta(
    schedule: PyTree, n: int, a: float = 0.6, b: float = 0.6,
    first: float | None = None, last: float | None = None,
) -> Array:  # fmt: skip
    """Quantiles of a Beta(a, b) distribution in t: dense at both ends (Lee et al. 2024).

    t_i = last + (first - last) F^-1(1 - i / n), i < n, then the data; on a table the result lies
    between steps (`round_steps`). ComfyUI's beta; diffusers spaces sigma, not t: `beta_sigma`.

    Raises:
      UserError: a or b is not positive.
    """
    s = start(schedule, n)
    first, last = between(s, first, last)
    return to_data(s, last + (first - last) * _quantiles("beta", np.arange(n, 0, -1) / n, a, b))


def beta_sigma(
    schedule: PyTree, n: int, a: float = 0.6, b: float = 0.6,
    first: float | None = None, last: float | None = None,
) -> Array:  # fmt: skip
    """Quantiles of a Beta(a, b) distribution in sigma / alpha: diffusers' use_beta_sigmas."""
    s = start(schedule, n)
    high, low = (jnp.exp(-0.5 * end) for end in finite(s, "beta_sigma", first, last))
    return by_sigma(s, low + (high - low) * _quantiles("beta_sigma", np.linspace(1, 0, n), a, b))


def linear_quadratic(
    schedule: PyTree, n: int, threshold: float = 0.025, linear: int | None = None
) -> Array:
    """Small even steps of t until 1 - t = `threshold`, then a parabola (Polyak et al. 2024).

    With L = `linear` steps (n // 2 unless given) and 1 - t = f: f_i = threshold i / L for i <= L,
    then the parabola that goes on with the same slope and ends at 1. t is relative to t_max. Movie
    Gen's, in the form of Mochi's and ComfyUI's linear_quadratic.

    Raises:
      UserError: the data is not at a finite t, threshold not in (0, 1), linear not in 1 to n - 1.
    """
    s = start(schedule, n)
    finite_data("linear_quadratic", s)
    if not 0.0 < threshold < 1.0:
        raise UserError(f"linear_quadratic: threshold={threshold} given; it lies in (0, 1).")
    if n == 1:
        return uniform(schedule, 1)
    L = n // 2 if linear is None else linear
    if not 1 <= L <= n - 1:
        raise UserError(f"linear_quadratic: linear={linear} given; with n={n}, 1 to {n - 1}.")
    i = np.arange(n + 1.0)
    slope, rest = threshold / L, n - L
    parabola = (1.0 - threshold - slope * rest) / rest**2
    f = slope * i + parabola * np.maximum(i - L, 0.0) ** 2
    left = jnp.asarray((1.0 - f)[:-1], jnp.result_type(float))
    return to_data(s, s.t_data + (s.t_max - s.t_data) * left)


def shifted(schedule: PyTree, n: int, shift: float = 3.0, grid: Grid = uniform) -> Array:
    """A grid on [0, 1] with its times shifted, s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23).

    SD3: shift 3; FLUX: shift=schedules.flux_shift(tokens). The network is told the shifted times.
    It is applied here, once: not together with `schedules.shifted`, and with the same shift in
    training's distribution of times.

    Raises:
      UserError: the schedule's time does not run from 0 to 1.
    """
    s = start(schedule, n)
    if s.T is not None or s.t_data != 0 or (is_concrete(s.t_max) and float(s.t_max) != 1.0):
        raise UserError(
            f"shifted: shifts times on [0, 1] (rectified_flow), given {type(s).__name__}; the "
            "logSNR of any schedule is moved by schedules.shifted."
        )
    return shift_time(grid(schedule, n), shift)


def _quantiles(where: str, probability: np.ndarray, a: float, b: float) -> Array:
    if not (a > 0 and b > 0):
        raise UserError(f"{where}: a={a} and b={b} given; both must be positive.")
    from scipy.special import betaincinv

    return jnp.asarray(betaincinv(a, b, probability), jnp.result_type(float))
