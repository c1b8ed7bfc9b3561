"""Scheduler configs as samplers: what is read from which key, and what is refused by name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import schedules, solvers
from jdiff.denoisers import function
from jdiff.errors import UserError
from jdiff.interop.schedulers import CLASSES, from_config, to_config
from jdiff.predictions import Prediction

SD15 = {  # as in Stable Diffusion 1.5's repository
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip


def _read(name, **config):
    return from_config({"_class_name": f"{name}Scheduler", **config})


def test_stable_diffusions_scheduler_in_full():
    sampler = from_config(SD15)
    table = schedules.scaled_linear()
    np.testing.assert_allclose(sampler.schedule.table, table.table)
    assert sampler.parameterization.target == "eps"
    assert jax.tree.structure(sampler.solver) == jax.tree.structure(solvers.plms())
    # 951, 901, ... 1 of diffusers' index, and then its index 0: abar never gets to 1
    np.testing.assert_array_equal(sampler.times(20), [*range(952, 0, -50), 1])
    assert float(sampler.start(jnp.ones(1), sampler.times(20))[0]) == 1.0


def test_fluxs_scheduler_in_full():
    sampler = from_config(FLUX, "FluxTransformer2DModel")
    shift = math.exp(1.15)  # of the 4096 tokens of 1024 x 1024 pixels
    t = np.linspace(1.0, 0.25, 4)
    np.testing.assert_allclose(
        sampler.times(4, tokens=4096), [*(shift * t / (1 + (shift - 1) * t)), 0.0], rtol=1e-6
    )
    assert (sampler.parameterization.target, sampler.parameterization.time) == ("velocity", "t")
    assert isinstance(sampler.schedule, schedules.RectifiedFlow)
    with pytest.raises(UserError, match="use_dynamic_shifting.*tokens="):
        sampler.times(4)


def test_the_size_of_an_image_changes_nothing_where_the_shift_is_a_number():
    sampler = _read("FlowMatchEulerDiscrete", shift=3.0)
    np.testing.assert_array_equal(sampler.times(4), sampler.times(4, tokens=77))


def test_a_config_is_written_back_as_it_was_read():
    other = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}
    for config in (SD15, FLUX, other):
        assert to_config(from_config(config)) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [("solver", solvers.ddim()), ("schedule", schedules.ddpm_linear()), ("clip", 1.0)],
)
def test_a_changed_sampler_is_not_written_as_another(field, value):
    changed = dataclasses.replace(from_config(SD15), **{field: value})
    with pytest.raises(UserError, match=f"sampler.{field}"):
        to_config(changed)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_reads_its_own_defaults(name):
    sampler = from_config({"_class_name": name, **CLASSES[name][0]})
    times = np.asarray(sampler.times(5))
    assert len(times) >= 5 and np.all(np.diff(times) < 0)


REFUSED = {
    "the class": ({"_class_name": "TCDScheduler"}, "TCDScheduler' is not known.*LCMScheduler"),
    "a slip": ({"beta_scedule": "linear"}, "beta_scedule.*Did you mean 'beta_schedule'"),
    "betas": ({"beta_schedule": "scaled_liner"}, "beta_schedule.*Did you mean 'scaled_linear'"),
    "a prediction": ({"prediction_type": "v"}, "prediction_type 'v'"),
    "a spacing": ({"timestep_spacing": "lead"}, "timestep_spacing 'lead'.*Did you mean 'leading'"),
    "two spacings": (
        {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_beta_sigmas.*karras already",
    ),
    "a wrong sign": (
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order=3.*nearest is 2",
    ),
    "an infinite step": ({"algorithm_type": "dpmsolver"}, "final_sigmas_type='zero'.*sigma_min"),
    "an order": ({"solver_order": 4}, "solver_order=4.*Allowed: 1, 2, 3"),
    "a variance": ({"variance_type": "learned"}, "variance_type='learned'.*learned_range"),
    "betas of another length": ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps=1000"),
    "dynamic flows": (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction",
         "use_dynamic_shifting": True}, "use_dynamic_shifting=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_served_is_refused_by_name(what):
    config, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        from_config({"_class_name": "DPMSolverMultistepScheduler"} | config)


REFUSED_ELSEWHERE = {
    "UniPCMultistep": ({"predict_x0": False}, "predict_x0=False"),
    "PNDM": ({"prediction_type": "v_prediction"}, "DDIMScheduler serves it"),
    "KDPM2Discrete": ({"use_karras_sigmas": True}, "HeunDiscreteScheduler serves it"),
    "EulerDiscrete": ({"sigma_min": 0.002, "sigma_max": 700.0}, "sigma_max=700"),
    "DPMSolverSinglestep": ({"solver_order": 3}, "solver_order=3.*Allowed: 1, 2"),
    "LCM": ({"timestep_scaling": 1.0}, "timestep_scaling=1.0"),
    "FlowMatchEulerDiscrete": ({"invert_sigmas": True}, "invert_sigmas=True"),
}


@pytest.mark.parametrize("name", REFUSED_ELSEWHERE)
def test_so_is_what_another_class_does_not_serve(name):
    config, message = REFUSED_ELSEWHERE[name]
    with pytest.raises(UserError, match=message):
        _read(name, **config)


def test_a_key_of_another_class_is_without_effect():
    one, other = _read("EulerDiscrete"), _read("EulerDiscrete", solver_order=3, clip_sample=True)
    np.testing.assert_array_equal(one.times(7), other.times(7))
    assert other.clip is None


def test_a_grid_that_the_table_does_not_have():
    with pytest.raises(UserError, match="n=1000.*steps_offset=1"):
        _read("DDIM", steps_offset=1).times(1000)
    with pytest.raises(UserError, match="n=51.*distilled on 50"):
        _read("LCM").times(51)
    with pytest.raises(UserError, match="n=0"):
        _read("DDIM").times(0)


def test_clipping_keeps_ddims_eps_and_recomputes_the_others():
    """x = alpha x0 + sigma eps stays true of DDPM's prediction, and not of DDIM's."""
    x, t = jnp.full((1, 4), 0.5), jnp.full((1,), 100.0)
    for name, consistent in (("DDPM", True), ("DDIM", False)):
        sampler = _read(name)
        s = sampler.schedule
        raw = function(lambda x, t, cond: Prediction(3.0 + 0 * x, 0.2 + 0 * x), s)
        clipped = sampler.denoiser(raw)(x, t)
        np.testing.assert_array_equal(clipped.x0, 1.0)
        mixed = s.alpha(t) * clipped.x0 + s.sigma(t) * clipped.eps
        assert bool(jnp.allclose(mixed, x, atol=1e-6)) == consistent
        assert bool(jnp.allclose(clipped.eps, 0.2)) == (not consistent)


def test_dynamic_thresholds_are_bounded():
    """The quantile of |x0| between 1 and sample_max_value is what x0 is divided by."""
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 4.0}
    clip = _read("DDPM", **config).clip
    x0 = jnp.asarray([[2.0, -2.0, 2.0], [0.1, 0.2, 8.0], [9.0, -9.0, 9.0]])
    expected = [[1.0, -1.0, 1.0], [0.1, 0.2, 1.0], [1.0, -1.0, 1.0]]
    np.testing.assert_allclose(clip(x0), expected, rtol=1e-6)


def test_a_learned_variance_takes_half_of_the_networks_channels():
    told = _read("DDPM", variance_type="learned_range").parameterization
    output, variance = told.split(jnp.ones((1, 2, 2, 6)))
    assert output.shape == variance.shape == (1, 2, 2, 3)
