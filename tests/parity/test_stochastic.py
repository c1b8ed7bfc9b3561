"""Stochastic solvers against k-diffusion's samplers and diffusers' schedulers, on the same noise.

All get one denoiser, a formula that torch and jax both evaluate, one grid of sigma / alpha and the
same draws. k-diffusion and diffusers' SASolver agree to 1e-9 in float64; the rest of diffusers
casts samples or levels to float32 and agrees to 1e-5. Where they differ from jdiff, and why:

* k-diffusion's dpmpp_sde asks a Brownian tree in sigma for the noise of its two overlapping
  intervals. Here the noise of the step is that of its two halves in the clock SNR, on which the
  posterior's noise adds up; the tree's clock gives the two draws another correlation.
* diffusers' DPMSolverMultistep of order 3 as "sde-dpmsolver++" subtracts 1/2 in the weight of D2
  where it should add it: as h -> 0 that weight tends to -alpha and not to 0. The test adds alpha D2
  back. It also halves the second derivative, as `kind="published"`.
* diffusers' SASolver changes the integrals of order 2 (`variant="bh1"`), and counts tau's range in
  steps of the table.
* diffusers' ScoreSdeVe takes the corrector's norms as means over the batch: batch 1 here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, x64
from peers import peer

from jdiff import schedules, solvers
from jdiff.denoisers import function
from jdiff.noise import Noise
from jdiff.predictions import from_x0
from jdiff.pytree import expand, struct

torch = peer("torch")
kd = peer("k_diffusion.sampling")
diffusers = peer("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of numpy and of names
SIGMAS = np.array([9.0, 5.5, 4.1, 2.0, 1.4, 0.9, 0.35, 0.3, 0.1])  # uneven
X = 9.0 * np.array([[-1.6, 0.3], [0.8, 2.2], [-0.2, -0.9]])
Z = np.random.default_rng(0).normal(size=(1000, 2, 3, 2))  # step, part


@struct
class Given(Noise):
    """The draws Z of step `number`."""

    draws: jax.Array
    number: jax.Array | int = 0

    def between(self, x, t, s, part=0):
        """Z[number, part]."""
        return self.draws[self.number, part, : len(x)].astype(x.dtype)

    def free(self, x, i=0):
        """Z[number, i]."""
        return self.draws[self.number, i, : len(x)].astype(x.dtype)


@jax.jit
def _march(solver, denoise, schedule, times, x, draws):
    def step(i, carry):
        x, memory = carry
        given = Given(draws, i)
        return solver.step(denoise, schedule, x, memory, times[i], times[i + 1], given, {})[:2]

    return jax.lax.fori_loop(0, len(times) - 1, step, (x, solver.init(x, times)))[0]


def _toy(y, sigma, sin):
    """Some x0 for y = x / alpha: smooth and far from linear."""
    return y / (1.0 + sigma**2) + 0.3 * sin(2.0 * y) / (1.0 + sigma)


def _denoiser(schedule):
    def denoise(x, t, cond):
        ratio = expand(schedule.sigma_ratio(t), x)
        x0 = _toy(x / expand(schedule.alpha(t), x), ratio, jnp.sin)
        return from_x0(schedule, x, x0, t)

    return function(denoise)


def _ours(solver, schedule, sigmas, x=X):
    times = at(schedule, sigmas)
    start = jnp.asarray(x) * schedule.alpha(times[0])
    end = _march(solver, _denoiser(schedule), schedule, times, start, jnp.asarray(Z))
    return np.asarray(end / schedule.alpha(times[-1]))


def _sampler(clock=None):
    """k-diffusion's noise_sampler: Z in order; with a clock, two overlapping intervals a step."""
    calls = []

    def draw(sigma, sigma_next):
        i = len(calls) if clock is None else len(calls) // 2
        calls.append((float(sigma), float(sigma_next)))
        if clock is None or len(calls) % 2:
            return torch.tensor(Z[i, 0])
        (start, inner), (_, end) = calls[-2:]
        share = (clock(inner) - clock(start)) / (clock(end) - clock(start))
        return torch.tensor(np.sqrt(share) * Z[i, 0] + np.sqrt(1 - share) * Z[i, 1])

    return draw


NOISY = {"eta": 0.8, "s_noise": 1.1}
KD = {
    "euler_ancestral": (kd.sample_euler_ancestral, NOISY, {}),
    "dpm_2_ancestral": (kd.sample_dpm_2_ancestral, NOISY, {}),
    "dpmpp_2s_ancestral": (kd.sample_dpmpp_2s_ancestral, NOISY, {}),
    "dpmpp_sde": (kd.sample_dpmpp_sde, {**NOISY, "r": 0.4}, {"r": 0.4}),
    "dpmpp_2m_sde": (kd.sample_dpmpp_2m_sde, NOISY, {"kind": "midpoint"}),
    "dpmpp_2m_sde_heun": (
        kd.sample_dpmpp_2m_sde, {**NOISY, "solver_type": "heun"}, {"kind": "heun"},
    ),
    "dpmpp_3m_sde": (kd.sample_dpmpp_3m_sde, NOISY, {"kind": "published"}),
}  # fmt: skip


@pytest.mark.parametrize("name", KD)
@x64
def test_k_diffusion_draws_the_same_sample_from_the_same_noise(name):
    """To sigma = 0; and on a schedule other than theirs, under x / alpha."""
    sampler, arguments, more = KD[name]
    noise = _sampler((lambda sigma: sigma**-2) if name == "dpmpp_sde" else None)
    theirs = sampler(
        lambda x, sigma: _toy(x, sigma[:, None], torch.sin), torch.tensor(X),
        torch.tensor(np.append(SIGMAS, 0.0)), disable=True, noise_sampler=noise, **arguments,
    )  # fmt: skip
    solver = solvers.BY_NAME[name.removesuffix("_heun")](**NOISY, **more)
    schedule = schedules.edm() if name.startswith("dpmpp_2m") else schedules.vp_linear()
    times = jnp.append(at(schedule, SIGMAS), 0.0)
    start = jnp.asarray(X) * schedule.alpha(times[0])
    ours = _march(solver, _denoiser(schedule), schedule, times, start, jnp.asarray(Z))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-9, atol=1e-10)


class _Feed:
    """Stands in for diffusers' randn_tensor: Z in order."""

    def __init__(self):
        self.calls = 0

    def __call__(self, shape, dtype=torch.float64, **_):
        self.calls += 1
        return torch.tensor(Z[self.calls - 1, 0, : shape[0]], dtype=dtype).reshape(shape)


def _fed(monkeypatch, scheduler):
    """The scheduler, drawing from Z."""
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", _Feed())
    return scheduler


def _eps(x, alpha, sigma):
    """The toy's eps, at x = alpha x0 + sigma eps."""
    return (x - alpha * _toy(x / alpha, sigma / alpha, torch.sin)) / sigma


VARIANCES = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": None}


@pytest.mark.parametrize("kind", VARIANCES)
def test_diffusers_ddpm_with_its_fixed_and_its_learned_variance(kind, monkeypatch):
    scheduler = diffusers.DDPMScheduler(variance_type=kind, clip_sample=False)
    scheduler = _fed(monkeypatch, scheduler)
    scheduler.set_timesteps(10)
    v = np.linspace(-1, 1, X.size, dtype=np.float32).reshape(X.shape)
    x = torch.tensor(0.1 * X, dtype=torch.float32)
    for i in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[i]
        output = _eps(x, abar.sqrt(), (1 - abar).sqrt())
        if kind == "learned_range":
            output = torch.cat([output, torch.tensor(v)], 1)
        x = scheduler.step(output, i, x).prev_sample

    s = schedules.ddpm_linear()
    plain = _denoiser(s)

    def denoise(x, t, cond):
        learned = 0.5 * (v + 1) if kind == "learned_range" else None
        return plain(x, t, cond)._replace(variance=learned)

    times = jnp.append(jnp.asarray(scheduler.timesteps.numpy() + 1.0, jnp.float32), 0.0)
    solver = solvers.ddpm(VARIANCES[kind] or 0.0)
    start = jnp.asarray(0.1 * X, jnp.float32)
    ours = _march(solver, function(denoise), s, times, start, jnp.asarray(Z))
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["EulerAncestral", "KDPM2Ancestral"])
@x64
def test_diffusers_ancestral_schedulers_in_the_scale_of_sigma(name, monkeypatch):
    scheduler = _fed(monkeypatch, getattr(diffusers, f"{name}DiscreteScheduler")())
    scheduler.set_timesteps(6)
    twice = name == "KDPM2Ancestral"  # with the inner sigmas between
    sigmas = scheduler.sigmas.unique().flip(0)
    x = torch.tensor(X)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas_interpol[i - 1] if twice and i % 2 else scheduler.sigmas[i]
        x = scheduler.step(_eps(x, 1.0, sigma.double()), t, x).prev_sample.double()
    solver = solvers.dpm_2_ancestral() if twice else solvers.euler_ancestral()
    schedule = schedules.edm(sigma_max=200.0)
    times = jnp.asarray(sigmas.numpy(), jnp.float64)
    ours = _march(solver, _denoiser(schedule), schedule, times, jnp.asarray(X), jnp.asarray(Z))
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-5, atol=1e-5)


def _on_a_grid(scheduler, sigmas):
    """A scheduler in the variance-preserving scale, driven over a grid of sigma / alpha."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.tensor(sigmas)
    alphas = 1.0 / np.sqrt(1.0 + sigmas**2)
    x = torch.tensor(alphas[0] * X)
    for alpha, sigma, t in zip(alphas, sigmas, scheduler.timesteps):
        x = scheduler.step(_eps(x, alpha, alpha * sigma), t, x).prev_sample.double()
    return x.numpy() / alphas[-1]


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@x64
def test_diffusers_dpm_solver_sde_of_order_2(kind, monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_type=kind, lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs = _on_a_grid(_fed(monkeypatch, scheduler), SIGMAS)
    ours = _ours(solvers.dpmpp_2m_sde(kind=kind), schedules.vp_linear(), SIGMAS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@x64
def test_diffusers_dpm_solver_sde_of_order_3_once_alpha_d2_is_added_back(monkeypatch):
    """Three steps, of which the last is of third order."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun",
        lower_order_final=False, final_sigmas_type="sigma_min",
    )  # fmt: skip
    sigmas = SIGMAS[:4]
    theirs = _on_a_grid(_fed(monkeypatch, scheduler), sigmas)
    x0 = [a.numpy() for a in scheduler.model_outputs]  # the latest last
    h1, h0, h = np.log(sigmas[:-1] / sigmas[1:])
    slope, last = (x0[2] - x0[1]) * h / h0, (x0[1] - x0[0]) * h / h1
    d2 = (slope - last) * h / (h0 + h1)
    ours = _ours(solvers.dpmpp_3m_sde(kind="published"), schedules.vp_linear(), sigmas)
    np.testing.assert_allclose(ours, theirs + d2, rtol=1e-5, atol=1e-5)
    assert np.abs(d2).max() > 0.05


@pytest.mark.parametrize(("predictor", "corrector"), [(1, 2), (2, 2), (3, 4)])
@x64
def test_diffusers_sa_solver(predictor, corrector, monkeypatch):
    """tau = 0.9 in a range, 0 outside; (3, 4) warms up through order 2."""
    scheduler = diffusers.SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector, lower_order_final=False,
        tau_func=lambda t: 0.9 if int(t) in inside else 0.0,
    )  # fmt: skip
    scheduler.set_timesteps(len(SIGMAS) - 1)
    steps = scheduler.timesteps.tolist()
    inside = [t for t, sigma in zip(steps, SIGMAS) if 0.34 < sigma < 4.2]
    theirs = _on_a_grid(_fed(monkeypatch, scheduler), SIGMAS)
    solver = solvers.sa_solver(0.9, 0.34, 4.2, predictor, corrector, "bh1")
    ours = _ours(solver, schedules.vp_linear(), SIGMAS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_diffusers_score_sde_ve_predictor_and_corrector(monkeypatch):
    scheduler = _fed(monkeypatch, diffusers.ScoreSdeVeScheduler(snr=0.15))
    scheduler.set_timesteps(5)
    scheduler.set_sigmas(5, sigma_min=0.1, sigma_max=9.0)
    sigmas = scheduler.discrete_sigmas.flip(0)
    x = torch.tensor(X[:1], dtype=torch.float32)
    score = lambda x, sigma: -_eps(x, 1.0, sigma) / sigma
    x = scheduler.step_pred(score(x, sigmas[0]), scheduler.timesteps[0], x).prev_sample
    for _ in range(2):
        x = scheduler.step_correct(score(x, sigmas[1]), x).prev_sample

    s = schedules.edm()
    t, u = (jnp.float32(sigma) for sigma in sigmas[:2])
    draws = jnp.asarray(Z[:3, 0])[None]  # the predictor's is part 0, the correctors' 1 and 2
    ours = solvers.predictor_corrector(snr=0.15, steps=2).step(
        _denoiser(s), s, jnp.asarray(X[:1], jnp.float32), (), t, u, Given(draws), {}
    )[0]
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-5, atol=1e-5)
