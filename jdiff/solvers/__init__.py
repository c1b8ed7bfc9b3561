"""Solvers: one step of a sampler each, as frozen pytrees of numbers.

Who lives here: the steps of ODE and SDE samplers, one family a file. A solver is

    memory = solver.init(x, times)
    x, memory, prediction = solver.step(denoise, schedule, x, memory, t, s, noise, cond)

from time t to the smaller time s: t and s are scalars, `noise` is the step's own (jdiff.noise),
and `prediction` is the denoiser's at (x, t), for who observes. A solver states its `order` (of the
global error on the ODE) and `evaluations`, the denoiser calls of a full step. A step that ends at
the data (sigma = 0) returns the predicted x0 exactly, adds no noise and evaluates nothing there.
"""

from jdiff.solvers.adaptive import adaptive, adaptive_count
from jdiff.solvers.ancestral import (
    ancestral,
    dpm_2_ancestral,
    dpmpp_2s_ancestral,
    euler_ancestral,
    res_multistep_ancestral,
)
from jdiff.solvers.base import Solver
from jdiff.solvers.ddnm import ddnm
from jdiff.solvers.deis import deis
from jdiff.solvers.dpm_solver import dpm_solver, dpm_solver_2m, dpm_solver_fast
from jdiff.solvers.dpmpp import dpmpp_2m, dpmpp_2s, dpmpp_3m, dpmpp_3m_published
from jdiff.solvers.dpmpp_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from jdiff.solvers.er_sde import er_sde
from jdiff.solvers.exponential import ddim
from jdiff.solvers.few_step import consistency, flow_map
from jdiff.solvers.gradient_estimation import gradient_estimation
from jdiff.solvers.interpolant import interpolant_sde
from jdiff.solvers.langevin import annealed_langevin, predictor_corrector, reverse_diffusion
from jdiff.solvers.linear_multistep import ipndm, lms, plms, pndm
from jdiff.solvers.ode import dpm_2, euler, heun, midpoint, rk4, runge_kutta
from jdiff.solvers.repaint import repaint
from jdiff.solvers.res import exp_heun, res_multistep, res_singlestep
from jdiff.solvers.restart import restart
from jdiff.solvers.sa_solver import sa_solver
from jdiff.solvers.sde import euler_maruyama
from jdiff.solvers.seeds import seeds_1, seeds_2, seeds_3
from jdiff.solvers.stochastic import ddpm, edm
from jdiff.solvers.unipc import unipc

#: Solvers by name, as the command line offers them.
BY_NAME = {
    "euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm, "edm": edm,
    # Runge-Kutta and linear multistep
    "midpoint": midpoint, "dpm_2": dpm_2, "rk4": rk4, "lms": lms, "plms": plms, "pndm": pndm,
    "ipndm": ipndm, "gradient_estimation": gradient_estimation, "adaptive": adaptive,
    # exponential integrators
    "dpm_solver": dpm_solver, "dpm_solver_2m": dpm_solver_2m, "dpm_solver_fast": dpm_solver_fast,
    "dpmpp_2s": dpmpp_2s, "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_published": dpmpp_3m_published, "deis": deis, "unipc": unipc,
    "res_multistep": res_multistep, "res_singlestep": res_singlestep, "exp_heun": exp_heun,
    # stochastic
    "euler_ancestral": euler_ancestral, "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral, "res_multistep_ancestral": res_multistep_ancestral,
    "dpmpp_sde": dpmpp_sde, "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m_sde": dpmpp_3m_sde,
    "seeds_1": seeds_1, "seeds_2": seeds_2, "seeds_3": seeds_3, "er_sde": er_sde,
    "sa_solver": sa_solver, "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion, "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
    # networks that jump
    "consistency": consistency, "flow_map": flow_map,
}  # fmt: skip

__all__ = [
    "BY_NAME", "Solver", "adaptive", "adaptive_count", "ancestral", "annealed_langevin",
    "consistency", "ddim", "ddnm", "ddpm", "deis", "dpm_2", "dpm_2_ancestral", "dpm_solver",
    "dpm_solver_2m", "dpm_solver_fast", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s",
    "dpmpp_2s_ancestral", "dpmpp_3m", "dpmpp_3m_published", "dpmpp_3m_sde", "dpmpp_sde", "edm",
    "er_sde", "euler", "euler_ancestral", "euler_maruyama", "exp_heun", "flow_map",
    "gradient_estimation", "heun", "interpolant_sde", "ipndm", "lms", "midpoint", "plms", "pndm",
    "predictor_corrector", "repaint", "res_multistep", "res_multistep_ancestral", "res_singlestep",
    "restart", "reverse_diffusion", "rk4", "runge_kutta", "sa_solver", "seeds_1", "seeds_2",
    "seeds_3", "unipc",
]  # fmt: skip
