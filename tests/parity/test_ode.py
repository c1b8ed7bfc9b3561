"""Runge-Kutta, multistep and inversion against k-diffusion (float64) and diffusers (float32).

The model on the other side is numpy's: the score of a mixture, by the noise level. Theirs agree
with ours at every step but the last, which is exact here: `lms` and the PNDM family extrapolate
their polynomial to sigma = 0 there, where we return the predicted image. At few steps that is the
better end, and it is what k-diffusion's and diffusers' own one-step methods do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_1d, mixture_score, x64
from peers import peer

from jdiff import grids, sample, schedules, solvers
from jdiff.inversion import invert

torch, diffusers, k_diffusion = peer("torch"), peer("diffusers"), peer("k_diffusion.sampling")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, theirs
N, T = 10, 1000
NUMBERS = mixture_1d(None)[1]
EPS = np.array([[-1.4], [-0.2], [0.5], [1.7]])
TABLE = dict(num_train_timesteps=T, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
ABAR = np.cumprod(1.0 - np.linspace(1e-4, 0.02, T))


def _eps(x_hat, ratio):
    """E[eps] from x / alpha, in numpy."""
    return -ratio * mixture_score(x_hat, ratio, NUMBERS)


def _ratio(index):
    """sigma / alpha of the table, between its steps interpolated in log as in both libraries."""
    log_sigma = 0.5 * np.log((1.0 - ABAR) / ABAR)
    return np.exp(np.interp(float(index), np.arange(T), log_sigma))


def _theirs(a):
    """numpy's as torch's."""
    return torch.from_numpy(np.asarray(a))


def _states(solver, schedule, x, times):
    """`[n + 1, B, 1]`: ours at every time of the grid."""
    end, path = sample(
        jax.random.key(0), mixture_1d(schedule)[0], x=x, times=times, solver=solver,
        observe=_observe,
    )  # fmt: skip
    return np.concatenate([path, end[None]])


def _observe(x, t, prediction):
    return x


SIGMA = {  # ours, k-diffusion's, diffusers', whether the last step is the same
    "euler": (solvers.euler, "sample_euler", "EulerDiscreteScheduler", True),
    "heun": (solvers.heun, "sample_heun", "HeunDiscreteScheduler", True),
    "dpm_2": (solvers.dpm_2, "sample_dpm_2", "KDPM2DiscreteScheduler", True),
    "lms": (solvers.lms, "sample_lms", "LMSDiscreteScheduler", False),
}


def _in_sigma(name):
    make = SIGMA[name][0]
    return make(variable="sigma") if name in ("euler", "heun") else make()


@pytest.mark.parametrize("name", SIGMA)
@x64
def test_k_diffusion_in_float64_and_diffusers_in_float32(name):
    """In x / alpha over the DDPM table."""
    s = schedules.ddpm_linear()
    times = grids.leading(s, N)
    ratios = np.array([*map(_ratio, np.asarray(times)[:-1] - 1), 0.0])
    start = ratios[0] * EPS
    alpha = np.asarray(s.alpha(times))[:, None, None]
    ours = _states(_in_sigma(name), s, start * alpha[0], times) / alpha
    _, theirs, discrete, same_end = SIGMA[name]
    until = None if same_end else -1

    states = []
    model = lambda x, sigma: x - sigma[:, None] * _theirs(_eps(x.numpy(), sigma[0].item()))
    end = getattr(k_diffusion, theirs)(
        model,
        _theirs(start),
        _theirs(ratios),
        disable=True,
        callback=lambda d: states.append(d["x"]),
    )
    np.testing.assert_allclose(
        ours[:until], np.stack([*states, end])[:until], rtol=1e-8 if name == "lms" else 1e-10
    )

    scheduler = getattr(diffusers, discrete)(**TABLE, timestep_spacing="leading")
    scheduler.set_timesteps(N)
    x, states = _theirs(start).float(), []
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t).numpy()
        ratio = _ratio(t)
        eps = _theirs(_eps(x_in * np.sqrt(1 + ratio**2), ratio)).float()
        states.append(x.numpy())
        x = scheduler.step(eps, t, x).prev_sample
    calls = 2 if name in ("heun", "dpm_2") else 1
    states = np.stack([*states[::calls], x.numpy()])
    np.testing.assert_allclose(ours[:until], states[:until], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "skip"), [("plms", True), ("pndm", False)])
@x64
def test_pndm_with_both_of_its_starts(name, skip):
    s = schedules.ddpm_linear()
    times = grids.leading(s, N)
    ours = _states(solvers.BY_NAME[name](), s, EPS, times)

    scheduler = diffusers.PNDMScheduler(**TABLE, skip_prk_steps=skip, set_alpha_to_one=True)
    scheduler.set_timesteps(N)
    calls = scheduler.timesteps.tolist()
    assert len(calls) == solvers.BY_NAME[name]().count(N)
    x, states = _theirs(EPS).float(), []
    for t in calls:
        ratio = _ratio(t)
        states.append(x.numpy())
        eps = _theirs(_eps(x.numpy() * np.sqrt(1 + ratio**2), ratio)).float()
        x = scheduler.step(eps, t, x).prev_sample
    # the calls at which a step starts: all but the second; or every fourth of twelve, and then all
    starts = [0, *range(2, N + 1)] if skip else [0, 4, 8, *range(12, N + 9)]
    np.testing.assert_allclose(ours[:-1], np.stack(states)[starts], rtol=2e-5, atol=2e-5)


@x64
def test_ipndm():
    """Theirs is on the cosine schedule, at times even in asin(sqrt(sigma)), with a v-network.

    Not from its own start, sigma = 1: there its x0 is (x - sigma eps) / max(alpha, 1e-8), which is
    0 / 1e-8, and the first step forgets the mean that the network predicted.
    """
    sigmas = np.append(np.sin(np.linspace(0.98, 0.0, N + 1)[:-1] * np.pi / 2) ** 2, 0.0)
    scheduler = diffusers.IPNDMScheduler(trained_betas=sigmas.tolist())
    scheduler.set_timesteps(N)
    s = schedules.cosine()
    times = jnp.append(jnp.asarray(scheduler.timesteps.numpy(), float), 0.0)
    np.testing.assert_allclose(s.sigma(times), scheduler.betas, atol=1e-6)
    ours = _states(solvers.ipndm(), s, EPS, times)
    x, states = _theirs(EPS).float(), []
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.alphas[i].item(), scheduler.betas[i].item()
        value = x.numpy().astype(float)
        eps = _eps(value / alpha, sigma / alpha)
        x0 = (value - sigma * eps) / alpha
        states.append(x.numpy())
        x = scheduler.step(_theirs(alpha * eps - sigma * x0).float(), t, x).prev_sample
    np.testing.assert_allclose(ours[:-1], np.stack(states), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["euler", "heun"])
@x64
def test_flow_matching_from_pure_noise(name):
    """Rectified flow, straight in t."""
    scheduler = getattr(diffusers, f"FlowMatch{name.title()}DiscreteScheduler")()
    scheduler.set_timesteps(N)
    calls = 2 if name == "heun" else 1
    sigmas = scheduler.sigmas.numpy().astype(float)
    times = np.unique(sigmas)[::-1]
    ours = _states(solvers.BY_NAME[name](), schedules.rectified_flow(), EPS, jnp.asarray(times))
    means, _, weights, _ = NUMBERS
    x, states = _theirs(EPS).float(), []
    for t in scheduler.timesteps:
        sigma, value = t.item() / T, x.numpy().astype(float)
        alpha = 1.0 - sigma
        eps = _eps(value / alpha, sigma / alpha) if alpha else value
        x0 = (value - sigma * eps) / alpha if alpha else np.full_like(value, weights @ means)
        states.append(x.numpy())
        x = scheduler.step(_theirs(eps - x0).float(), t, x).prev_sample
    states = np.stack([*states[::calls], x.numpy()])
    np.testing.assert_allclose(ours, states, rtol=2e-5, atol=2e-5)


@x64
def test_ddim_inversion_from_the_data():
    s = schedules.ddpm_linear()
    times = grids.leading(s, N)[::-1]
    ours = invert(mixture_1d(s)[0], 0.7 * EPS, times=times)
    scheduler = diffusers.DDIMInverseScheduler(
        **TABLE, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(N)
    x = _theirs(0.7 * EPS).float()
    for t in scheduler.timesteps:
        ratio = _ratio(t)
        eps = _theirs(_eps(x.numpy() * np.sqrt(1 + ratio**2), ratio)).float()
        x = scheduler.step(eps, t, x).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), rtol=2e-5, atol=2e-5)
