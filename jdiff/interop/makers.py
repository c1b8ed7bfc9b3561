"""How each class of diffusers' schedulers is made of ours: a function of its config each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdiff import schedules, solvers
from jdiff.errors import UserError, choose
from jdiff.interop.sampler import Clip, Told
from jdiff.interop.spacings import DistilledGrid, Dynamic, FlowGrid, FlowSteps, LevelGrid, TableGrid
from jdiff.interop.steps import FinalUniPC, LowerOrderFinal, Singlestep, ThirdOrder
from jdiff.schedules import Schedule
from jdiff.solvers import Solver

_TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}
#: The pipelines that give FlowMatchEuler times of their own: what the network is told, and the
#: last time (see `FlowGrid`).
_NETWORKS = {
    "FluxTransformer2DModel": ("t", "even"),
    "QwenImageTransformer2DModel": ("t", "even"),
    "ZImageTransformer2DModel": ("t", "even"),
}


class Config:
    """A config with its defaults; reading a value that is not served is an error."""

    def __init__(self, name: str, values: dict[str, Any]):
        self.name, self.values = name, values

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def one_of(self, key: str, *allowed: Any) -> Any:
        """The value of a key, which is one of those allowed."""
        value = self[key]
        if value not in allowed:
            if isinstance(value, str):
                choose(f"{self.name}: {key}", value, [a for a in allowed if isinstance(a, str)])
            names = ", ".join(repr(a) for a in allowed)
            raise UserError(f"{self.name}: {key}={value!r} is not served. Allowed: {names}.")
        return value

    def refuse(self, key: str, why: str) -> None:
        """Raises the error for a value."""
        raise UserError(f"{self.name}: {key}={self[key]!r} is not served: {why}")


class Parts(NamedTuple):
    """The fields of a `Sampler` that a class makes."""

    schedule: Schedule
    parameterization: Told
    solver: Solver
    grid: Callable[..., Any]
    start_as: str = "noise"
    clip: Clip | None = None


def _table(c: Config, exact: bool = False) -> Schedule:
    """The discrete table; where it ends without signal, exactly so, or with diffusers' 2^-24."""
    T, ends = c["num_train_timesteps"], (c["beta_start"], c["beta_end"])
    if c["trained_betas"] is not None:
        table = schedules.from_betas([float(beta) for beta in c["trained_betas"]])
        if table.T != T:
            c.refuse("num_train_timesteps", f"there are {table.T} trained_betas.")
    else:
        kinds = ("linear", "scaled_linear", "squaredcos_cap_v2")
        kind = c.one_of("beta_schedule", *kinds)
        if kind == "squaredcos_cap_v2":
            table = schedules.squared_cosine(T)
        else:
            make = schedules.ddpm_linear if kind == "linear" else schedules.scaled_linear
            table = make(T, *ends)
    if not c["rescale_betas_zero_snr"]:
        return table
    if exact:
        return schedules.zero_terminal_snr(table)
    alpha = np.sqrt(1.0 / (1.0 + np.exp(-np.asarray(table.table, np.float64))))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha[-1] = 2.0**-12
    return schedules.Discrete(jnp.asarray(2.0 * np.log(alpha) - np.log1p(-(alpha**2))), table.T)


def _predicts(c: Config, time: str = "step", rounding: str = "none", **more: Any) -> Told:
    """The parameterisation of prediction_type."""
    kinds = [k for k in _TARGETS if k != "flow_prediction"]
    target = _TARGETS[c.one_of("prediction_type", *kinds)]
    variance = c["variance_type"]
    if variance == "learned":
        c.refuse("variance_type", "the nearest is 'learned_range'.")
    learned = "learned_range" if variance == "learned_range" else "fixed"
    return Told(target, time, 0.5, learned, rounding, **more)


def _kept(c: Config, consistent: bool = True) -> Clip | None:
    if c["thresholding"]:
        most = float(c["sample_max_value"])
        return Clip(1.0, c["dynamic_thresholding_ratio"], most, consistent)
    return Clip(float(c["clip_sample_range"]), None, 1.0, consistent) if c["clip_sample"] else None


def _spacing(c: Config) -> dict[str, Any]:
    spacing = c.one_of("timestep_spacing", "leading", "trailing", "linspace")
    return {"spacing": spacing, "offset": c["steps_offset"] if spacing == "leading" else 0}


def _levels(c: Config) -> str | None:
    names = ("karras", "exponential", "beta")
    on = [name for name in names if c[f"use_{name}_sigmas"]]
    on += ["lu"] * bool(c["use_lu_lambdas"])
    if len(on) > 1:
        key = f"use_{on[1]}_sigmas" if on[1] != "lu" else "use_lu_lambdas"
        c.refuse(key, f"the sigmas are {on[0]} already; set one of them.")
    return on[0] if on else None


def ddim(c: Config, network: str) -> Parts:
    """DDIMScheduler; its eps stays what the network says where x0 is clipped."""
    final = "zero" if c["set_alpha_to_one"] else "sigma_min"
    grid = TableGrid("ddim", **_spacing(c), final=final)
    clip = _kept(c, consistent=False)
    return Parts(_table(c, exact=True), _predicts(c), solvers.ddim(), grid, clip=clip)


def ddpm(c: Config, network: str) -> Parts:
    """DDPMScheduler."""
    kinds = ("fixed_small", "fixed_small_log", "learned_range", "fixed_large")
    large = c.one_of("variance_type", *kinds) == "fixed_large"
    grid = TableGrid("ddim", **_spacing(c))
    solver = solvers.ddpm(1.0 if large else 0.0)
    return Parts(_table(c, exact=True), _predicts(c), solver, grid, clip=_kept(c))


def pndm(c: Config, network: str) -> Parts:
    """PNDMScheduler; a last step to the data extrapolates as the others do."""
    if c["prediction_type"] != "epsilon":
        c.refuse("prediction_type", "it adds up outputs, not slopes; DDIMScheduler serves it.")
    final = "nearly_zero" if c["set_alpha_to_one"] else "sigma_min"
    solver = solvers.plms() if c["skip_prk_steps"] else solvers.pndm()
    return Parts(_table(c), _predicts(c), solver, TableGrid("ddim", **_spacing(c), final=final))


def lcm(c: Config, network: str) -> Parts:
    """LCMScheduler: x0, and noise anew. c_skip is below 3e-5 at all of its steps, and left out."""
    steps = c["original_inference_steps"]
    table = _table(c)
    if (table.T // steps - 1) * c["timestep_scaling"] < 100:
        c.refuse("timestep_scaling", "the network's output would not be x0 alone at small steps.")
    grid, solver = DistilledGrid(steps), solvers.consistency()
    return Parts(table, _predicts(c), solver, grid, clip=_kept(c))


def in_sigma(solver: Solver, final: str = "zero") -> Callable[[Config, str], Parts]:
    """Schedulers in k-diffusion's scale of sigma, for one solver."""

    def make(c: Config, network: str) -> Parts:
        spacing, levels = _spacing(c), _levels(c)
        if c.name.startswith("KDPM2") and levels == "karras":
            c.refuse("use_karras_sigmas", "it tells whole steps at some of its evaluations; "
                     "HeunDiscreteScheduler serves it.")  # fmt: skip
        c.one_of("final_sigmas_type", None, "zero", "sigma_min")
        if c["interpolation_type"] not in (None, "linear"):
            c.refuse("interpolation_type", "the nearest is use_exponential_sigmas.")
        start_as = "noise" if spacing["spacing"] == "leading" else "sigma"
        end = c["final_sigmas_type"] or "zero"
        end = final if end == "zero" else end
        table = _table(c)
        ends = _ends(c, table)
        continuous = c["timestep_type"] == "continuous" and c["prediction_type"] == "v_prediction"
        if continuous and ends is not None and levels in ("karras", "exponential"):
            low, high = ends
            path = schedules.linear_logsnr(-2.0 * math.log(high), -2.0 * math.log(low))
            grid = LevelGrid(levels, low, high, final=end)
            return Parts(path, _predicts(c, "log_sigma"), solver, grid, start_as)
        if ends is not None and not _inside(ends, table):
            c.refuse(
                "sigma_max", "the betas do not reach it, and the network knows only their steps."
            )
        grid = TableGrid("euler", **spacing, levels=levels, ends=ends, final=end)
        told = _predicts(c, "log_sigma" if continuous else "step")
        return Parts(table, told, solver, grid, start_as, _kept(c))

    return make


def _ends(c: Config, table: Schedule) -> tuple[float, float] | None:
    """sigma_min and sigma_max, those of the table where one is missing; None where both are."""
    if c["sigma_min"] is None and c["sigma_max"] is None:
        return None
    if c["sigma_min"] is None or c["sigma_max"] is None:
        missing = "sigma_min" if c["sigma_min"] is None else "sigma_max"
        c.refuse(missing, "give both ends, or neither.")
    return float(c["sigma_min"]), float(c["sigma_max"])


def _inside(ends: tuple[float, float], table: Schedule) -> bool:
    low, high = (float(jnp.exp(-0.5 * table.table[i])) for i in (0, -1))
    return low * (1 - 1e-5) <= ends[0] < ends[1] <= high * (1 + 1e-5)


def _whole_steps(c: Config, solver: Callable[[int], Solver], final: str) -> Parts:
    """The DPM-Solver family: n of n + 1 steps of the table, or levels between its ends, or flows.

    `solver` is given how many steps of no length the grid leaves out.
    """
    if c["use_flow_sigmas"]:
        return _flow_steps(c, solver, final)
    table, levels = _table(c), _levels(c)
    style = {"spacing": "linspace"} if c["timestep_spacing"] is None else _spacing(c)
    clipped = c["lambda_min_clipped"]
    top = None
    if clipped is not None and clipped > -math.inf:
        top = int(np.sum(0.5 * np.asarray(table.table) >= clipped))
    final = "sigma_min" if final == "stay" else final
    grid = TableGrid("dpm", **style, levels=levels, top=top, final=final)
    # what diffusers rounds before it casts to integers
    rounded = levels == "karras" and c.name.startswith(("DEIS", "UniPC", "DPMSolverSinglestep"))
    rounded |= levels in ("karras", "lu") and c["beta_schedule"] != "squaredcos_cap_v2"
    rounding = "none" if levels is None else "round" if rounded else "floor"
    dropped = int(levels is not None and final == "sigma_min")
    told = _predicts(c, rounding=rounding)
    return Parts(table, told, solver(dropped), grid, clip=_kept(c))


def _flow_steps(c: Config, solver: Callable[[int], Solver], final: str) -> Parts:
    """use_flow_sigmas: rectified flow, told 1000 t cast to an integer."""
    c.one_of("prediction_type", "flow_prediction")
    c.one_of("use_dynamic_shifting", False)
    c.one_of("num_train_timesteps", 1000)
    if _levels(c) is not None:
        c.refuse(f"use_{_levels(c)}_sigmas", "use_flow_sigmas has sigmas of its own.")
    unipc = c.name.startswith("UniPC")
    if final == "sigma_min":
        c.refuse("final_sigmas_type", "its sigma_min is that of betas; the nearest is 'zero'.")
    final = "zero" if final == "zero" else "stay"
    style = "unipc" if unipc else "dpm"
    grid = FlowSteps(style, float(c["flow_shift"]), 1000, c["shift_terminal"], final)
    told = Told("velocity", "t1000", 0.5, "fixed", "floor")
    path = schedules.rectified_flow()
    return Parts(path, told, solver(int(final != "zero")), grid, clip=_kept(c))


def _dpm_method(c: Config) -> Solver:
    """The multistep solver of solver_order, algorithm_type and solver_type."""
    kinds = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "deis")
    algorithm = c.one_of("algorithm_type", *(k for k in kinds if not _edm_only(c, k)))
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm  # as diffusers reads it
    order = c.one_of("solver_order", 1, 2, 3)
    kind = c.one_of("solver_type", "midpoint", "heun", "logrho", "bh1", "bh2")
    kind = "heun" if kind == "heun" else "midpoint"
    if algorithm == "dpmsolver" and c["final_sigmas_type"] == "zero":
        c.refuse("final_sigmas_type", "in eps the last step would be infinite; 'sigma_min' is.")
    if algorithm == "sde-dpmsolver++":
        if order == 3:
            c.refuse("solver_order", "diffusers' third order of this SDE has a sign wrong and does "
                     "not converge; the nearest is 2.")  # fmt: skip
        method = solvers.dpmpp_2m_sde(kind=kind)
        return solvers.ddim(1.0) if order == 1 else method
    of = "x0" if algorithm == "dpmsolver++" else "eps"
    if order == 1:
        return solvers.ddim()
    if order == 3:
        return ThirdOrder(of, kind)
    methods = {
        ("x0", "midpoint"): solvers.dpmpp_2m, ("x0", "heun"): solvers.res_multistep,
        ("eps", "midpoint"): solvers.dpm_solver_2m, ("eps", "heun"): lambda: solvers.deis(2),
    }  # fmt: skip
    return methods[of, kind]()


def _edm_only(c: Config, algorithm: str) -> bool:
    return c.name.startswith("EDM") and algorithm == "dpmsolver"


def _lowered(c: Config, method: Solver) -> Callable[[int], Solver]:
    """The solver with its order lowered at the end, where the config says so and it matters."""
    short, euler = bool(c["lower_order_final"]), bool(c["euler_at_final"])
    order = c["solver_order"]
    to_data = c["final_sigmas_type"] == "zero" and not c.name.startswith("DEIS")
    # A step to the data is of order 1 anyway, so that order 2 has nothing to lower.
    needed = order == 3 and short or order == 2 and (short or euler) and not to_data
    needed |= order == 3 and euler and not to_data
    return lambda dropped: LowerOrderFinal(method, short, euler, dropped) if needed else method


def dpm(c: Config, network: str) -> Parts:
    """DPMSolverMultistepScheduler."""
    final = c.one_of("final_sigmas_type", "zero", "sigma_min")
    return _whole_steps(c, _lowered(c, _dpm_method(c)), final)


def deis(c: Config, network: str) -> Parts:
    """DEISMultistepScheduler, which never goes to the data."""
    c.one_of("algorithm_type", "deis", "dpmsolver", "dpmsolver++")
    c.one_of("solver_type", "logrho", "midpoint", "heun", "bh1", "bh2")
    method = solvers.deis(c.one_of("solver_order", 1, 2, 3))
    return _whole_steps(c, _lowered(c, method), "stay")


def unipc(c: Config, network: str) -> Parts:
    """UniPCMultistepScheduler, in x0."""
    c.one_of("predict_x0", True)
    c.one_of("disable_corrector", [], None)
    c.one_of("solver_p", None)
    c.one_of("sigma_min", None)
    c.one_of("sigma_max", None)
    variant = c.one_of("solver_type", "bh2", "bh1", "midpoint", "heun", "logrho")
    variant = "bh1" if variant == "bh1" else "bh2"
    order = c.one_of("solver_order", 1, 2, 3)
    final = c.one_of("final_sigmas_type", "zero", "sigma_min")
    if final == "sigma_min" and (c["use_flow_sigmas"] or _levels(c) is not None):
        c.refuse("final_sigmas_type", "its last step has no length, but is corrected; the nearest "
                 "is 'zero'.")  # fmt: skip
    lowered = c["lower_order_final"] and (order == 3 or final == "sigma_min")
    solver = FinalUniPC(order, variant) if lowered else solvers.unipc(order, variant)
    return _whole_steps(c, lambda _: solver, final)


def singlestep(c: Config, network: str) -> Parts:
    """DPMSolverSinglestepScheduler of order 1 and 2."""
    algorithm = c.one_of("algorithm_type", "dpmsolver++", "dpmsolver", "deis")
    kind = c.one_of("solver_type", "midpoint", "heun", "logrho", "bh1", "bh2")
    final = c.one_of("final_sigmas_type", "zero", "sigma_min")
    if algorithm == "dpmsolver" and final == "zero":
        c.refuse("final_sigmas_type", "in eps the last step would be infinite; 'sigma_min' is.")
    if final == "sigma_min" and _levels(c) is not None:
        c.refuse("final_sigmas_type", "its last step would have no length; the nearest is 'zero'.")
    if c.one_of("solver_order", 1, 2) == 1:
        return _whole_steps(c, lambda _: solvers.ddim(), final)
    of, kind = (
        ("eps" if algorithm == "dpmsolver" else "x0"),
        ("heun" if kind == "heun" else "midpoint"),
    )
    even = bool(c["lower_order_final"]) or final == "zero"  # as diffusers has it
    return _whole_steps(c, lambda _: Singlestep(of, kind, even), final)


def flow_match(c: Config, network: str) -> Parts:
    """FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler."""
    c.one_of("num_train_timesteps", 1000)
    c.one_of("invert_sigmas", False, None)
    time, lowest = _NETWORKS.get(network, ("t1000", "table"))
    shift: float | Dynamic = float(c["shift"])
    if c["use_dynamic_shifting"]:
        keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        kind = c.one_of("time_shift_type", "exponential", "linear")
        shift = Dynamic(*(c[key] for key in keys), kind)
    grid = FlowGrid(shift, lowest, 1000, c["shift_terminal"], _levels(c))
    solver = solvers.consistency() if c["stochastic_sampling"] else solvers.euler()
    solver = solvers.heun() if "Heun" in c.name else solver
    told = Told("velocity", time)
    return Parts(schedules.rectified_flow(), told, solver, grid)


def edm(c: Config, network: str) -> Parts:
    """EDMEulerScheduler and EDMDPMSolverMultistepScheduler."""
    low, high = float(c["sigma_min"]), float(c["sigma_max"])
    sign = {"epsilon": 1.0, "v_prediction": -1.0}
    sign = sign[c.one_of("prediction_type", *sign)]
    told = Told("edm", "log_sigma", float(c["sigma_data"]), "fixed", "none", sign)
    levels = c.one_of("sigma_schedule", "karras", "exponential")
    final = c.one_of("final_sigmas_type", "zero", "sigma_min")
    grid = LevelGrid(levels, low, high, float(c["rho"]), final)
    solver = solvers.ddim()
    if "DPMSolver" in c.name:
        solver = _lowered(c, _dpm_method(c))(int(final == "sigma_min"))
    return Parts(schedules.edm(low, high), told, solver, grid, "norm", _kept(c))
