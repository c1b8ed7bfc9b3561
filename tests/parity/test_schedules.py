"""Schedules and grids against diffusers' schedulers, k-diffusion and flow_matching.

diffusers makes its tables in float32, so they are compared to 3e-5: the product of a thousand
rounded factors is not more accurate. The rest is compared to 1e-6 in float32, 1e-10 in float64.

Where they differ from jdiff, and why:

* diffusers' Euler schedulers interpolate sigma linearly between a table's steps, k-diffusion and
  jdiff log sigma: compared at the steps themselves.
* diffusers' FlowMatchEulerDiscrete without `sigmas` shifts its lower end twice (its sigma_min is
  already shifted when `set_timesteps` shifts the grid from it); compared with `sigmas` given, as
  the FLUX pipeline gives them, and the doubled end is pinned below.
* diffusers' Euler and DPM-Solver schedulers replace the last alphas_cumprod of a zero-terminal-SNR
  table by 2^-24, since their eps needs one; DDIM's scheduler, which does not, is the reference.
* diffusers' "beta" spaces sigma (`beta_sigma`); the paper and ComfyUI space t (`beta`).
"""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64
from peers import peer

from jdiff import grids, schedules

torch = peer("torch")
diffusers = peer("diffusers")
kd = peer("k_diffusion.sampling")
fm = peer("flow_matching.path.scheduler")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of numpy and of names
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_TABLE = schedules.scaled_linear()

TABLES = {
    "linear": (schedules.ddpm_linear, {}),
    "scaled_linear": (schedules.scaled_linear, {"beta_start": 0.00085, "beta_end": 0.012}),
    "squaredcos_cap_v2": (schedules.squared_cosine, {}),
}


@pytest.mark.parametrize("name", TABLES)
@x64
def test_tables_are_diffusers_alphas_cumprod(name):
    make, options = TABLES[name]
    theirs = diffusers.DDIMScheduler(beta_schedule=name, **options).alphas_cumprod.numpy()
    ours = np.asarray(make().alpha(np.arange(1, 1001)) ** 2)
    np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=1e-9)


@x64
def test_zero_terminal_snr_is_diffusers_rescale_betas_zero_snr():
    theirs = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    s = schedules.zero_terminal_snr(schedules.scaled_linear())
    ours = np.asarray(s.alpha(np.arange(1, 1001)) ** 2)
    assert ours[-1] == theirs[-1] == 0.0
    np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("n", [10, 25, 999])
def test_leading_trailing_and_linspace_are_diffusers(n):
    for spacing in ("leading", "trailing", "linspace"):
        theirs = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing)
        theirs.set_timesteps(n)
        ours = np.asarray(grids.BY_NAME[spacing](SD_TABLE, n))
        np.testing.assert_array_equal(ours[:-1] - 1, theirs.timesteps.numpy(), spacing)
    theirs = diffusers.DDIMScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(n)
    ours = np.asarray(grids.leading(SD_TABLE, n, offset=1))
    np.testing.assert_array_equal(ours[:-1] - 1, theirs.timesteps.numpy())


@pytest.mark.parametrize("n", [10, 27])
def test_dpm_solvers_linspace_is_sgm_uniform_rounded(n):
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="linspace")
    theirs.set_timesteps(n)
    ours = grids.round_steps(SD_TABLE, grids.sgm_uniform(SD_TABLE, n))
    np.testing.assert_array_equal(np.asarray(ours)[:-1] - 1, theirs.timesteps.numpy())


SIGMAS = {
    "karras": ("EulerDiscreteScheduler", "use_karras_sigmas"),
    "exponential": ("EulerDiscreteScheduler", "use_exponential_sigmas"),
    "beta_sigma": ("EulerDiscreteScheduler", "use_beta_sigmas"),
    "lu": ("DPMSolverMultistepScheduler", "use_lu_lambdas"),
}


@pytest.mark.parametrize("name", SIGMAS)
@x64
def test_grids_of_sigma_are_diffusers(name):
    scheduler, option = SIGMAS[name]
    theirs = getattr(diffusers, scheduler)(**SD, **{option: True}, timestep_spacing="linspace")
    theirs.set_timesteps(12)
    s = schedules.scaled_linear()
    # its grids start from the ends of its own spacing, for DPM-Solver as for Euler the table's
    levels = np.asarray(s.sigma_ratio(grids.BY_NAME[name](s, 12)))
    np.testing.assert_allclose(levels, theirs.sigmas.numpy(), rtol=3e-5)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@x64
def test_align_your_steps_is_diffusers_table(model):
    kept = peer("diffusers.schedulers.scheduling_utils").AysSchedules
    name = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}[model]
    s = schedules.scaled_linear()
    times = grids.align_your_steps(s, 10, model)
    # the table ends at 14.6146
    np.testing.assert_allclose(s.sigma_ratio(times), kept[f"{name}Sigmas"], rtol=3e-5)
    theirs = diffusers.EulerDiscreteScheduler(**SD)
    theirs.set_timesteps(sigmas=kept[f"{name}Sigmas"])
    np.testing.assert_allclose(times[:-1] - 1, theirs.timesteps.numpy(), atol=2e-2)


def test_shifted_is_flow_match_euler_with_a_static_shift():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    ours = grids.shifted(schedules.rectified_flow(), 12, shift=3.0)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=1e-6)


def test_without_sigmas_flow_match_euler_shifts_its_lower_end_twice():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(12)
    twice = schedules.shift_time(schedules.shift_time(1e-3, 3.0), 3.0)
    np.testing.assert_allclose(theirs.sigmas.numpy()[-2], twice, rtol=1e-5)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_shifted_is_flow_match_euler_with_flux_dynamic_shift(tokens):
    mu = np.interp(tokens, [256, 4096], [0.5, 1.15])
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12), mu=mu)
    shift = schedules.flux_shift(tokens)
    ours = grids.shifted(schedules.rectified_flow(), 12, shift=shift)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=1e-6)


@x64
def test_grids_of_sigma_are_k_diffusions():
    s = schedules.edm(0.03, 200.0)
    grid = {
        "karras": (grids.karras(s, 9), kd.get_sigmas_karras(9, 0.03, 200.0)),
        "exponential": (grids.uniform_logsnr(s, 9), kd.get_sigmas_exponential(9, 0.03, 200.0)),
        "polyexponential": (
            grids.polyexponential(s, 9, rho=1.7),
            kd.get_sigmas_polyexponential(9, 0.03, 200.0, rho=1.7),
        ),
        "vp": (grids.vp(s, 9), kd.get_sigmas_vp(9)),
    }
    for name, (ours, theirs) in grid.items():
        # theirs is float32, and exp(x) - 1 at vp's end has four digits left
        rtol = 3e-4 if name == "vp" else 1e-5
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=rtol, err_msg=name)


PATHS = {
    "rectified_flow": (schedules.rectified_flow, lambda: fm.CondOTScheduler()),
    "polynomial": (lambda: schedules.polynomial(3.0), lambda: fm.PolynomialConvexScheduler(3.0)),
    "vp_linear": (schedules.vp_linear, lambda: fm.VPScheduler(0.1, 20.0)),
    "linear_vp": (schedules.linear_vp, lambda: fm.LinearVPScheduler()),
    "gvp": (schedules.gvp, lambda: fm.CosineScheduler()),
}


@pytest.mark.parametrize("name", PATHS)
@x64
def test_paths_are_flow_matchings_under_t_to_1_minus_t(name):
    make, theirs = PATHS[name]
    s, t = make(), np.linspace(0.05, 0.95, 13)
    out = theirs()(torch.tensor(1 - t))
    ours = (s.alpha(t), s.sigma(t), *s.rates(jnp.asarray(t)))
    expected = (out.alpha_t, out.sigma_t, -out.d_alpha_t, -out.d_sigma_t)
    for a, b in zip(ours, expected):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-10, atol=1e-12)
    back = 1 - theirs().snr_inverse(out.alpha_t / out.sigma_t).numpy()
    np.testing.assert_allclose(s.time(s.logsnr(t)), back, rtol=1e-8)
