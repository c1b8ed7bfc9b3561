"""Exponential integrators against diffusers' schedulers and k-diffusion's samplers.

All get one denoiser, a formula that torch and jax both evaluate, and one grid of sigma / alpha.
diffusers' DPMSolverMultistep casts samples to float32, so it is compared to 1e-5; the rest to 1e-10
in float64.

Where they differ from jdiff, and why:

* diffusers' `lower_order_final` lowers the order of the last steps of a short grid. It is switched
  off: here a step is of lower order only where its length is infinite.
* 3M (diffusers' order 3, k-diffusion's 3m_sde) lacks a factor 2 of the second derivative: it is
  `dpmpp_3m_published`, and `dpmpp_3m` is not it. Its second step is Adams' ("heun" of diffusers).
* diffusers' singlestep solver of order 3 takes its second stage from its solver of order 2, with or
  without the midpoint, and is none of the paper's algorithms; k-diffusion's steps are.
* diffusers' UniPC and DEIS at sigma = 0 would take log 0: their grids end above it here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, x64
from peers import peer

from jdiff import grids, sample, schedules, solvers
from jdiff.denoisers import function
from jdiff.predictions import from_x0
from jdiff.pytree import expand, struct
from jdiff.solvers.dpmpp import DPMpp3MPublished

torch = peer("torch")
kd = peer("k_diffusion.sampling")
diffusers = peer("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of numpy and of names
KEY = jax.random.key(0)
X = np.array([[-1.6, 0.3], [0.8, 2.2], [-0.2, -0.9]])  # x / sigma at the start
SIGMAS = np.array([9.0, 5.5, 4.1, 2.0, 1.4, 0.9, 0.35, 0.3, 0.1])  # uneven
EVEN = np.geomspace(9.0, 0.1, 9)


def _toy(y, sigma, sin):
    """Some x0 for y = x / alpha: smooth and far from linear."""
    return y / (1.0 + sigma**2) + 0.3 * sin(2.0 * y) / (1.0 + sigma)


def _denoiser(make):
    """The toy on a schedule, made when called: float64 is not on before."""

    def denoise(x, t, cond):
        schedule = make()
        ratio = expand(schedule.sigma_ratio(t), x)
        x0 = _toy(x / expand(schedule.alpha(t), x), ratio, jnp.sin)
        return from_x0(schedule, x, x0, t)

    return function(denoise)


EDM, VP = _denoiser(schedules.edm), _denoiser(schedules.vp_linear)


def _ours(solver, sigmas, denoise, make):
    """x at the end of the grid, from sigma x at its start."""
    schedule = make()
    times = at(schedule, sigmas)
    x = schedule.sigma(times[0]) * jnp.asarray(X)
    return sample(KEY, denoise, schedule=schedule, x=x, times=times, solver=solver)


def _kd_model(x, sigma):
    return _toy(x, sigma[:, None], torch.sin)


KD = {
    "dpmpp_2m": (kd.sample_dpmpp_2m, {}),
    "dpmpp_2s": (kd.sample_dpmpp_2s_ancestral, {"eta": 0.0}),
    "dpmpp_3m_published": (kd.sample_dpmpp_3m_sde, {"eta": 0.0, "noise_sampler": zip}),
    "res_multistep": (
        kd.sample_dpmpp_2m_sde,
        {"eta": 0.0, "noise_sampler": zip, "solver_type": "heun"},
    ),
}


@pytest.mark.parametrize("name", KD)
@x64
def test_k_diffusions_samplers_step_by_step_down_to_the_data(name):
    sampler, options = KD[name]
    sigmas = np.append(SIGMAS, 0.0)
    theirs = sampler(
        _kd_model, torch.tensor(SIGMAS[0] * X), torch.tensor(sigmas), disable=True, **options
    )
    ours = _ours(solvers.BY_NAME[name](), sigmas, EDM, schedules.edm)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10)


@pytest.mark.parametrize(
    ("order", "stages"), [(1, {}), (2, {"r1": 0.3}), (3, {"r1": 0.2, "r2": 0.7})]
)
@x64
def test_dpm_solvers_steps_are_k_diffusions(order, stages):
    step = getattr(kd.DPMSolver(_kd_model), f"dpm_solver_{order}_step")
    x = torch.tensor(SIGMAS[0] * X)
    for a, b in zip(SIGMAS, SIGMAS[1:]):
        x, _ = step(x, -torch.tensor(a).log(), -torch.tensor(b).log(), **stages)
    ours = _ours(solvers.dpm_solver(order, **stages), SIGMAS, EDM, schedules.edm)
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-10)


@pytest.mark.parametrize("nfe", [9, 10, 11])
@x64
def test_dpm_solver_fast_is_k_diffusions_for_any_remainder(nfe):
    ends = [-torch.tensor(s, dtype=torch.float64).log() for s in (9.0, 0.1)]
    theirs = kd.DPMSolver(_kd_model).dpm_solver_fast(torch.tensor(9.0 * X), *ends, nfe)
    sigmas = np.geomspace(9.0, 0.1, nfe // 3 + 2)
    ours = _ours(solvers.dpm_solver_fast(nfe), sigmas, EDM, schedules.edm)
    # k-diffusion's linspace of times is float32's
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def _diffusers(scheduler, sigmas):
    """A scheduler of diffusers driven over a grid of sigma / alpha."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.tensor(sigmas)
    alpha = 1.0 / np.sqrt(1.0 + sigmas**2)
    x = torch.tensor(sigmas[0] * alpha[0] * X)
    for i, t in enumerate(scheduler.timesteps):
        x0 = _toy(x / alpha[i], sigmas[i], torch.sin)
        eps = (x - alpha[i] * x0) / (sigmas[i] * alpha[i])
        x = scheduler.step(eps, t, x).prev_sample
    return x.numpy()


@struct
class DPMSolver3MPublished(DPMpp3MPublished):
    """The same slip in eps."""

    of = "eps"


MULTISTEP = {
    "dpmsolver++ 1": (solvers.ddim, {"solver_order": 1}),
    "dpmsolver++ 2 midpoint": (solvers.dpmpp_2m, {"solver_order": 2}),
    "dpmsolver++ 2 heun": (solvers.res_multistep, {"solver_order": 2, "solver_type": "heun"}),
    "dpmsolver++ 3": (solvers.dpmpp_3m_published, {"solver_order": 3, "solver_type": "heun"}),
    "dpmsolver 1": (solvers.ddim, {"solver_order": 1}),
    "dpmsolver 2 midpoint": (solvers.dpm_solver_2m, {"solver_order": 2}),
    "dpmsolver 2 heun": (lambda: solvers.deis(2), {"solver_order": 2, "solver_type": "heun"}),
    "dpmsolver 3": (DPMSolver3MPublished, {"solver_order": 3, "solver_type": "heun"}),
}
WHOLE = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("name", MULTISTEP)
@x64
def test_dpm_solver_multistep(name):
    make, options = MULTISTEP[name]
    kind = name.split()[0]
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type=kind, **WHOLE, **options)
    theirs = _diffusers(scheduler, SIGMAS)
    np.testing.assert_allclose(_ours(make(), SIGMAS, VP, schedules.vp_linear), theirs, rtol=1e-5)


@x64
def test_the_3m_with_its_factor_is_another_method():
    """The two differ by far more than the tolerance above: the agreement there means something."""
    one, other = (
        _ours(make(), SIGMAS, VP, schedules.vp_linear)
        for make in (solvers.dpmpp_3m, solvers.dpmpp_3m_published)
    )
    assert np.abs(one / other - 1).min() > 1e-4


SINGLESTEP = {
    "dpmsolver++ midpoint": solvers.dpmpp_2s,
    "dpmsolver++ heun": solvers.res_singlestep,
    "dpmsolver midpoint": lambda: solvers.dpm_solver(2),
}


@pytest.mark.parametrize("name", SINGLESTEP)
@x64
def test_dpm_solver_singlestep_spends_two_of_diffusers_steps_on_one(name):
    kind, variant = name.split()
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type=kind, solver_type=variant, solver_order=2, **WHOLE
    )
    theirs = _diffusers(scheduler, EVEN)
    ours = _ours(SINGLESTEP[name](), EVEN[::2], VP, schedules.vp_linear)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
@x64
def test_deis_in_log_rho(order):
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    theirs = _diffusers(scheduler, SIGMAS)
    ours = _ours(solvers.deis(order), SIGMAS, VP, schedules.vp_linear)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@x64
def test_unipc_predictor_and_corrector(order, variant):
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=order, solver_type=variant, **WHOLE)
    theirs = _diffusers(scheduler, SIGMAS)
    ours = _ours(solvers.unipc(order, variant), SIGMAS, VP, schedules.vp_linear)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_ddim_on_the_table_to_the_data():
    """In float32, as diffusers has its table; set_alpha_to_one is the step to the data."""
    schedule = schedules.ddpm_linear()
    times = grids.leading(schedule, 10)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    assert [float(t) - 1 for t in times[:-1]] == scheduler.timesteps.tolist()
    x = torch.tensor(X, dtype=torch.float32)
    for t in scheduler.timesteps:
        alpha2 = scheduler.alphas_cumprod[t]
        ratio = ((1 - alpha2) / alpha2).sqrt()
        x0 = _toy(x / alpha2.sqrt(), ratio, torch.sin)
        x = scheduler.step((x - alpha2.sqrt() * x0) / (1 - alpha2).sqrt(), t, x).prev_sample
    ours = sample(
        KEY, _denoiser(schedules.ddpm_linear), schedule=schedule, x=jnp.asarray(X, jnp.float32),
        times=times, solver=solvers.ddim(),
    )  # fmt: skip
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-5, atol=1e-5)
