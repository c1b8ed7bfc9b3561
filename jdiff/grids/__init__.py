"""Time grids: the falling times that a solver visits, `[n + 1]` values for n steps.

Every grid starts at `first` (the schedule's t_max unless given) and ends at the data,
`schedule.t_data`, where no denoiser is evaluated: n steps ask for the denoiser at the first n
values. A grid is an array like any other: slice it to start half-way, or write your own.

`first` and `last` are times. A grid that is made in sigma means sigma / alpha, EDM's noise level,
so that every grid serves every schedule that reaches its levels. `BY_NAME` has the names of other
tools too; those that are one formula are one function (`exponential` and `lu` are
`uniform_logsnr`).
"""

from collections.abc import Callable
from typing import Any

from jdiff.grids.base import check, custom, img2img, round_steps, tail
from jdiff.grids.formulas import (
    beta,
    beta_sigma,
    karras,
    kl_optimal,
    linear_quadratic,
    polyexponential,
    shifted,
    uniform,
    uniform_logsnr,
    vp,
)
from jdiff.grids.published import align_your_steps
from jdiff.grids.tables import (
    ddim_uniform,
    iddpm,
    iddpm_levels,
    leading,
    linspace,
    normal,
    sgm_uniform,
    simple,
    trailing,
)

#: Grids by name, as the command line offers them: (schedule, n) -> times.
BY_NAME: dict[str, Callable[..., Any]] = {
    "uniform": uniform, "uniform_logsnr": uniform_logsnr, "karras": karras,
    "exponential": uniform_logsnr, "lu": uniform_logsnr, "polyexponential": polyexponential,
    "vp": vp, "kl_optimal": kl_optimal, "beta": beta, "beta_sigma": beta_sigma,
    "linear_quadratic": linear_quadratic, "shifted": shifted,
    "leading": leading, "trailing": trailing, "linspace": linspace, "simple": simple,
    "ddim_uniform": ddim_uniform, "sgm_uniform": sgm_uniform, "normal": normal, "iddpm": iddpm,
    "align_your_steps": align_your_steps,
}  # fmt: skip

__all__ = [
    "BY_NAME", "align_your_steps", "beta", "beta_sigma", "check", "custom", "ddim_uniform",
    "iddpm", "iddpm_levels", "img2img", "karras", "kl_optimal", "leading", "linear_quadratic",
    "linspace", "normal", "polyexponential", "round_steps", "sgm_uniform", "shifted", "simple",
    "tail", "trailing", "uniform", "uniform_logsnr", "vp",
]  # fmt: skip
