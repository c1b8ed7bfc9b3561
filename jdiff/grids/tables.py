"""Grids of a discrete table's steps, under the names of DDPM's code, diffusers and ComfyUI.

One name, several spacings: `leading`, `trailing` and `linspace` are those of diffusers' DDIM and
Euler schedulers. Its DPM-Solver family divides by n + 1 instead (leading) and is
`round_steps(schedule, sgm_uniform(schedule, n))` (linspace).
"""

import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.grids.base import by_sigma, start, to_data
from jdiff.pytree import Array, PyTree, is_concrete


def leading(schedule: PyTree, n: int, offset: int = 0) -> Array:
    """A discrete table's steps 0, T // n, 2 (T // n), ... from their start, plus `offset`.

    In the index of diffusers and DDPM's code (our t - 1): 900, 800, ..., 0 for n = 10, T = 1000.

    Raises:
      UserError: not a table, more steps than it has, or an offset that leads beyond its end.
    """
    T = _table("leading", schedule, n)
    if not 0 <= offset <= T - 1 - (n - 1) * (T // n):
        raise UserError(
            f"leading: offset={offset} given; with n={n} and T={T}, allowed are 0 to "
            f"{T - 1 - (n - 1) * (T // n)}."
        )
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


def simple(schedule: PyTree, n: int) -> Array:
    """A discrete table's steps T - floor(i T / n) (ComfyUI): `trailing` where n divides T."""
    T = _table("simple", schedule, n)
    return _steps([T - i * T // n for i in range(n)])


def ddim_uniform(schedule: PyTree, n: int) -> Array:
    """`leading` with offset 1, the spacing of DDIM in latent diffusion's code and in ComfyUI.

    Theirs has a step more where n does not divide T.
    """
    return leading(schedule, n, offset=1)


def sgm_uniform(schedule: PyTree, n: int) -> Array:
    """From t_max to t_min in n equal steps without the last value, then the data (ComfyUI).

    Between a table's steps: a discrete network that knows no such times needs `round_steps`.
    """
    s = start(schedule, n)
    return to_data(s, jnp.linspace(s.t_max, s.t_min, n + 1)[:-1])


def normal(schedule: PyTree, n: int) -> Array:
    """From t_max to t_min, both included, then the data (ComfyUI): `linspace` without rounding.

    Where t_min is the data itself it is `uniform`.
    """
    s = start(schedule, n)
    if is_concrete(s.t_min) and float(s.t_min) == s.t_data:
        return jnp.linspace(s.t_max, s.t_data, n + 1)
    return to_data(s, jnp.linspace(s.t_max, s.t_min, n))


def iddpm_levels(M: int = 1000, C1: float = 0.001, C2: float = 0.008) -> np.ndarray:
    """u_0 > ... > u_{M-1} `[M]` float64: the noise levels of iDDPM (Karras et al. 2022, table 1).

    u_M = 0, u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C1) - 1), with
    abar_j = sin^2(pi / 2 j / (M (C2 + 1))).
    """
    abar = np.sin(0.5 * np.pi * np.arange(M + 1) / (M * (C2 + 1))) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], C1) - 1)
    return u[:-1]


def iddpm(
    schedule: PyTree, n: int, M: int = 1000, j0: int = 8, C1: float = 0.001, C2: float = 0.008
) -> Array:
    """u_{floor(j0 + (M - 1 - j0) / (n - 1) i + 1 / 2)}: iDDPM's (Karras et al. 2022, table 1).

    The levels are sigma / alpha and so serve any schedule that reaches 80.2, the largest at j0 = 8.

    Raises:
      UserError: more steps than levels.
    """
    s = start(schedule, n)
    if n > M - j0:
        raise UserError(f"iddpm: n={n} steps given; there are M - j0 = {M - j0} noise levels.")
    i = np.arange(n)
    index = np.floor(j0 + (M - 1 - j0) / max(n - 1, 1) * i + 0.5).astype(int)
    return by_sigma(s, jnp.asarray(iddpm_levels(M, C1, C2)[index], jnp.result_type(float)))


def _table(where: str, schedule: PyTree, n: int) -> int:
    s = start(schedule, n)
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
