"""Solvers: one step of a sampler each, as frozen pytrees of numbers.

Who lives here: the steps of ODE and SDE samplers, one family a file. A solver is

    memory = solver.init(x, times)
    x, memory, prediction = solver.step(denoise, schedule, x, memory, t, s, noise, cond)

from time t to the smaller time s: t and s are scalars, `noise` is the step's own (jdiff.noise),
and `prediction` is the denoiser's at (x, t), for who observes. A solver states its `order` (of the
global error on the ODE) and `evaluations`, the denoiser calls of a full step. A step that ends at
the data (sigma = 0) returns the predicted x0 exactly, adds no noise and evaluates nothing there.
"""

from jdiff.solvers.base import Solver
from jdiff.solvers.exponential import ddim, dpmpp_2m
from jdiff.solvers.ode import euler, heun
from jdiff.solvers.stochastic import ddpm, edm

#: Solvers by name, as the command line offers them.
BY_NAME = {
    "euler": euler, "heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "ddpm": ddpm, "edm": edm,
}  # fmt: skip

__all__ = ["BY_NAME", "Solver", "ddim", "ddpm", "dpmpp_2m", "edm", "euler", "heun"]
