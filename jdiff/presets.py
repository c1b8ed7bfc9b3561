"""The design choices of Karras et al. 2022 (EDM), table 1, one preset a column.

A preset is a whole point in the design space: path, network preconditioning, training distribution,
loss weighting, time grid and solver. Where the table writes x = s(t) (y + sigma(t) n), s is our
alpha and sigma(t) our sigma / alpha; its D(x; sigma) of the unscaled x is our denoiser's x0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdiff import distributions, grids, schedules, solvers, weightings
from jdiff.predictions import Parameterization, parameterization
from jdiff.pytree import Array
from jdiff.schedules import Discrete, Schedule
from jdiff.solvers import Solver


class Preset(NamedTuple):
    """One column of the table.

    Attributes:
      schedule: sigma(t) and s(t), with its domain.
      parameterization: c_skip, c_out, c_in and c_noise.
      distribution: of the training noise levels.
      weighting: lambda(sigma), on the squared error of the denoised image.
      grid: n -> times `[n + 1]`.
      solver: the deterministic one.
    """

    schedule: Schedule
    parameterization: Parameterization
    distribution: Any
    weighting: Any
    grid: Callable[[int], Array]
    solver: Solver


def vp() -> Preset:
    """DDPM++ of Song et al. (2021): beta_d = 19.9, beta_min = 0.1, eps_s = 1e-3, eps_t = 1e-5."""
    schedule = schedules.vp_linear(0.1, 20.0, t_min=1e-5)
    return Preset(
        schedule=schedule,
        parameterization=parameterization("eps", "t999"),
        distribution=distributions.uniform(),
        weighting=weightings.eps(),
        grid=partial(grids.uniform, schedule, last=1e-3),
        solver=solvers.euler(),
    )


def ve() -> Preset:
    """NCSN++ of Song et al. (2021): sigma = sqrt(t) from 0.02 to 100, log-uniform in training.

    The network predicts -eps, sigma times the score, from the unscaled input (c_in = 1).
    """
    schedule = schedules.ve_sqrt(0.02, 100.0)
    ends = (float(schedule.logsnr(t)) for t in (schedule.t_max, schedule.t_min))
    return Preset(
        schedule=schedule,
        parameterization=parameterization("scaled_score", "log_half_sigma"),
        distribution=distributions.logsnr_uniform(*ends),
        weighting=weightings.eps(),
        grid=partial(grids.uniform_logsnr, schedule),
        solver=solvers.euler(),
    )


def iddpm() -> Preset:
    """Improved DDPM (Nichol and Dhariwal 2021) sampled by DDIM: M = 1000, C1 = 0.001, C2 = 0.008.

    The schedule is the table of levels u_j in its variance-preserving form, step t = M - j, which
    is how such a network is fed: c_in x and its index M - 1 - j. The paper's sigma(t) = t, s(t) = 1
    by Euler is DDIM in this form, step for step.
    """
    levels = grids.iddpm_levels()
    schedule = Discrete(jnp.asarray(-2.0 * np.log(levels[::-1])), len(levels))
    return Preset(
        schedule=schedule,
        parameterization=parameterization("eps", "nearest_step"),
        distribution=distributions.uniform(),
        weighting=weightings.eps(),
        grid=lambda n: grids.round_steps(schedule, grids.iddpm(schedule, n)),
        solver=solvers.ddim(),
    )


def edm(sigma_data: float = 0.5) -> Preset:
    """The paper's own: sigma 0.002 to 80, rho = 7, P_mean = -1.2, P_std = 1.2, and Heun."""
    schedule = schedules.edm(0.002, 80.0)
    return Preset(
        schedule=schedule,
        parameterization=parameterization("edm", sigma_data=sigma_data),
        distribution=distributions.lognormal(-1.2, 1.2),
        weighting=weightings.edm(sigma_data),
        grid=partial(grids.karras, schedule),
        solver=solvers.heun(),
    )


#: The columns of table 1 by name.
BY_NAME = {"vp": vp, "ve": ve, "iddpm": iddpm, "edm": edm}
