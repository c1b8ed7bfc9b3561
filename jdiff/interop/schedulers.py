"""diffusers' scheduler_config.json as a schedule, a parameterisation, a solver and a grid.

    sampler = interop.schedulers.from_config(json.loads(path.read_text()))
    denoise = sampler.denoiser(
        denoisers.network(apply, params, sampler.schedule, sampler.parameterization))
    times = sampler.times(30)
    x = sample(key, denoise, x=sampler.start(noise, times), times=times, solver=sampler.solver)

samples as the scheduler does from the same noise, with diffusers' defaults for what a config does
not say. What cannot be served is a UserError that names the key. Where ours differ on purpose:

* DDIM and PNDM of diffusers step by T // n whatever the spacing, and then ask the network at the
  grid's next step; here a step ends where the network is asked next. The two are the same with
  "leading", and with "trailing" where n divides T.
* At a zero terminal SNR diffusers' DDIM and DDPM have no signal, as here; its other schedulers have
  2^-24 of it, and so have they here.
* diffusers' DDPM with variance_type "fixed_large" adds noise to the final image where its last step
  is not the table's first ("trailing"); here nothing is added to the data.
* diffusers' UniPC with "bh1" to final_sigmas_type "zero" is not a number: infinity times 0. Here it
  ends as "bh2" does, with the predicted image.
* The rounding of a float32 decides which of two neighbouring steps diffusers tells the network
  where it casts times to integers.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jdiff import solvers
from jdiff.errors import UserError, choose
from jdiff.interop import makers
from jdiff.interop.sampler import Sampler

_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None,
}  # fmt: skip
_LATENT = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_TABLE = {"prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0}
_ZERO = {"rescale_betas_zero_snr": False}
_LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample_range": 1.0}
_FLOW = {
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}  # fmt: skip
_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0,
    "final_sigmas_type": "zero",
}  # fmt: skip
_DPM = {
    "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
    "lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero",
}  # fmt: skip
#: The classes that are read: their defaults in diffusers, and how they are made.
CLASSES: dict[str, tuple[dict[str, Any], Callable[[makers.Config, str], makers.Parts]]] = {
    "DDIMScheduler": (
        _BETAS | _TABLE | _ZERO | _THRESHOLD | _CLIP
        | {"clip_sample": True, "set_alpha_to_one": True, "timestep_spacing": "leading"},
        makers.ddim,
    ),
    "DDPMScheduler": (
        _BETAS | _TABLE | _ZERO | _THRESHOLD | _CLIP
        | {"clip_sample": True, "variance_type": "fixed_small", "timestep_spacing": "leading"},
        makers.ddpm,
    ),
    "PNDMScheduler": (
        _BETAS | _TABLE
        | {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"},
        makers.pndm,
    ),
    "LCMScheduler": (
        _LATENT | _TABLE | _ZERO | _THRESHOLD | _CLIP
        | {"beta_schedule": "scaled_linear", "original_inference_steps": 50, "clip_sample": False,
           "set_alpha_to_one": True, "timestep_spacing": "leading", "timestep_scaling": 10.0},
        makers.lcm,
    ),
    "LMSDiscreteScheduler": (
        _BETAS | _TABLE | _LEVELS, makers.in_sigma(solvers.lms(), "nearly_zero"),
    ),
    "EulerDiscreteScheduler": (
        _BETAS | _TABLE | _ZERO | _LEVELS
        | {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None,
           "timestep_type": "discrete", "final_sigmas_type": "zero"},
        makers.in_sigma(solvers.ddim()),
    ),
    "EulerAncestralDiscreteScheduler": (
        _BETAS | _TABLE | _ZERO, makers.in_sigma(solvers.euler_ancestral()),
    ),
    "HeunDiscreteScheduler": (
        _LATENT | _TABLE | _LEVELS | _CLIP | {"clip_sample": False},
        makers.in_sigma(solvers.heun(variable="sigma")),
    ),
    "KDPM2DiscreteScheduler": (_LATENT | _TABLE | _LEVELS, makers.in_sigma(solvers.dpm_2())),
    "KDPM2AncestralDiscreteScheduler": (
        _LATENT | _TABLE | _LEVELS, makers.in_sigma(solvers.dpm_2_ancestral()),
    ),
    "DPMSolverMultistepScheduler": (
        _BETAS | _TABLE | _ZERO | _LEVELS | _THRESHOLD | _FLOW | _DPM
        | {"use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None},
        makers.dpm,
    ),
    "DPMSolverSinglestepScheduler": (
        _BETAS | {"prediction_type": "epsilon"} | _LEVELS | _THRESHOLD | _FLOW
        | {k: v for k, v in _DPM.items() if k != "euler_at_final"}
        | {"lower_order_final": False, "lambda_min_clipped": -math.inf, "variance_type": None},
        makers.singlestep,
    ),
    "UniPCMultistepScheduler": (
        _BETAS | _TABLE | _ZERO | _LEVELS | _THRESHOLD | _FLOW
        | {"solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True,
           "disable_corrector": [], "solver_p": None, "final_sigmas_type": "zero",
           "sigma_min": None, "sigma_max": None, "shift_terminal": None},
        makers.unipc,
    ),
    "DEISMultistepScheduler": (
        _BETAS | _TABLE | _LEVELS | _THRESHOLD | _FLOW
        | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho",
           "lower_order_final": True},
        makers.deis,
    ),
    "FlowMatchEulerDiscreteScheduler": (
        _LEVELS
        | {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False,
           "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
           "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
           "time_shift_type": "exponential", "stochastic_sampling": False},
        makers.flow_match,
    ),
    "FlowMatchHeunDiscreteScheduler": (
        {"num_train_timesteps": 1000, "shift": 1.0}, makers.flow_match,
    ),
    "EDMEulerScheduler": (_EDM, makers.edm),
    "EDMDPMSolverMultistepScheduler": (_EDM | _THRESHOLD | _DPM, makers.edm),
}  # fmt: skip

#: Every key of every class: those that a class does not have are without effect in its config, and
#: so are some of schedulers that are not read. Others are taken for slips.
KNOWN = {key for defaults, _ in CLASSES.values() for key in defaults} | {
    "predictor_order", "corrector_order", "tau_func", "noise_sampler_seed", "s_noise",
    "clip_denoised", "snr", "sampling_eps",
}  # fmt: skip


def from_config(config: Mapping[str, Any], network: str = "") -> Sampler:
    """The sampler of a scheduler_config.json.

    Args:
      config: what the file holds; keys that its class does not have are ignored, as in diffusers.
      network: the `_class_name` of the network, on which it depends what FLUX's, Qwen-Image's and
        Z-Image's pipelines make of FlowMatchEulerDiscreteScheduler.

    Raises:
      UserError: a class, a key or a value that is not served, with the nearest that is.

    >>> sampler = from_config({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True})
    """
    given = config.get("_class_name", "")
    name = choose("scheduler: _class_name", given, CLASSES)
    defaults, make = CLASSES[name]
    for key in config:
        if not key.startswith("_"):
            choose(f"{name}: key", key, KNOWN)
    c = makers.Config(name, {**defaults, **{k: v for k, v in config.items() if k in defaults}})
    parts = make(c, network)
    return Sampler(
        parts.schedule, parts.parameterization, parts.solver, parts.clip, parts.grid,
        parts.start_as, json.dumps(dict(config)), network,
    )  # fmt: skip


def to_config(sampler: Sampler) -> dict[str, Any]:
    """The scheduler_config.json that a sampler was read from.

    Raises:
      UserError: the sampler was changed since, by field; a config cannot say how.
    """
    config = json.loads(sampler.config)
    original = from_config(config, sampler.network)
    for name in ("schedule", "parameterization", "solver", "clip", "grid", "start_as"):
        mine, theirs = getattr(sampler, name), getattr(original, name)
        if not _same(mine, theirs):
            raise UserError(
                f"to_config: sampler.{name} is not what {config['_class_name']} says; save the "
                "sampler that was loaded, or write a config by hand."
            )
    return config


def _same(a: Any, b: Any) -> bool:
    """Whether two fields are one pytree with the same numbers, or equal."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)
