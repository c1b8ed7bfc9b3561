"""Samplers read from scheduler configs against diffusers' schedulers, from the same noise.

Both drive one small network as diffusers' pipelines do, ten steps in float32, and agree to 2e-5 of
the largest value (DEIS to 1e-4). Stochastic ones get the same draws. What the docstring of
`jdiff.interop.schedulers` says differs is not in the list.
"""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import peer

from jdiff import denoisers, sample
from jdiff.interop.schedulers import CLASSES, from_config
from jdiff.noise import Noise
from jdiff.pytree import struct

torch = peer("torch")
diffusers = peer("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of numpy and of names
N = 10
NOISE = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)  # theirs: [B, C, ...]
DRAWS = np.random.default_rng(1).normal(size=(32, *NOISE.shape)).astype(np.float32)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
LEADING, TRAILING = {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}
ONE = LEADING | {"steps_offset": 1}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
BETA, LU = {"use_beta_sigmas": True}, {"use_lu_lambdas": True}
MIN = {"final_sigmas_type": "sigma_min"}
CONTINUOUS = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8}

#: Sampled with: one of each program that comes of them.
RUNS = {
    "DDIM": [{}, SD | ONE | {"set_alpha_to_one": False, "clip_sample": False}, ZERO | TRAILING,
             THRESHOLD | X0],
    "DDPM": [{}, {"variance_type": "fixed_large", "clip_sample": False}],
    "PNDM": [SD | ONE | {"skip_prk_steps": True}, {"set_alpha_to_one": True}],
    "LCM": [{}],
    "LMSDiscrete": [SD],
    "EulerDiscrete": [ONE, KARRAS, SD | EXPONENTIAL, ZERO | TRAILING,
                      V | KARRAS | LEADING | CONTINUOUS],
    "EulerAncestralDiscrete": [SD, LEADING],
    "HeunDiscrete": [{}, {"clip_sample": True} | LEADING],
    "KDPM2Discrete": [{}],
    "KDPM2AncestralDiscrete": [{}],
    "DPMSolverMultistep": [
        SD, ONE, KARRAS | MIN, THRESHOLD | {"solver_type": "heun"}, {"solver_order": 3},
        {"solver_order": 3, "use_lu_lambdas": True} | SD | MIN,
        {"algorithm_type": "dpmsolver"} | MIN,
        {"algorithm_type": "dpmsolver", "solver_order": 3, "lower_order_final": False} | MIN,
        {"algorithm_type": "dpmsolver", "solver_type": "heun", "euler_at_final": True,
         "lower_order_final": False} | MIN,
        {"algorithm_type": "sde-dpmsolver++"} | SD, FLOW | {"flow_shift": 3.0},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1} | MIN,
    ],
    "DPMSolverSinglestep": [{}, {"solver_type": "heun", "lower_order_final": True} | MIN,
                            {"algorithm_type": "dpmsolver"} | MIN],
    "UniPCMultistep": [SD, ONE | MIN, {"solver_order": 3, "solver_type": "bh1"} | MIN],
    "DEISMultistep": [SD, KARRAS, {"solver_order": 3}, FLOW],
    "FlowMatchEulerDiscrete": [{}, {"shift": 3.0} | KARRAS, {"stochastic_sampling": True}],
    "FlowMatchHeunDiscrete": [{"shift": 3.0}],
    "EDMEuler": [{}, V | {"sigma_schedule": "exponential", "sigma_data": 1.0}],
    "EDMDPMSolverMultistep": [V | {"solver_order": 3}, MIN | {"sigma_schedule": "exponential"},
                              {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}],
}  # fmt: skip
#: Compared in their levels, times and starts alone, as are those above.
GRIDS = {
    "DDIM": [{"beta_schedule": "squaredcos_cap_v2"}, SD | V,
             {"trained_betas": [0.01, 0.2] * 30, "num_train_timesteps": 60},
             {"num_train_timesteps": 100, "timestep_spacing": "linspace"}],
    "DDPM": [V | THRESHOLD | TRAILING],
    "PNDM": [TRAILING | {"skip_prk_steps": True}],
    "LCM": [{"original_inference_steps": 40}],
    "LMSDiscrete": [KARRAS | V, LEADING],
    "EulerDiscrete": [SD, KARRAS | SD | MIN, TRAILING, BETA,
                      SD | {"sigma_min": 0.1, "sigma_max": 9.0} | KARRAS,
                      V | CONTINUOUS | EXPONENTIAL, V | {"timestep_type": "continuous"}],
    "HeunDiscrete": [KARRAS | V, TRAILING],
    "KDPM2Discrete": [V | LEADING, EXPONENTIAL],
    "DPMSolverMultistep": [
        TRAILING | X0, MIN, KARRAS | SD, BETA, ZERO | TRAILING, EXPONENTIAL, EXPONENTIAL | MIN,
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"} | KARRAS,
        {"lambda_min_clipped": -3.0}, {"lambda_min_clipped": -2.0} | LEADING,
        {"lambda_min_clipped": -2.0} | TRAILING, {"use_lu_lambdas": True},
    ],
    "DPMSolverSinglestep": [KARRAS | V, BETA, {"solver_order": 1, "lambda_min_clipped": -3.0}],
    "UniPCMultistep": [KARRAS, FLOW | {"flow_shift": 5.0}, FLOW | {"shift_terminal": 0.1},
                       EXPONENTIAL, ZERO | TRAILING, BETA],
    "DEISMultistep": [EXPONENTIAL, LEADING, FLOW | {"flow_shift": 2.0}],
    "FlowMatchEulerDiscrete": [{"shift": 3.0}, {"shift_terminal": 0.02}, {"shift": 2.0} | BETA,
                               {"shift": 3.0} | EXPONENTIAL],
    "FlowMatchHeunDiscrete": [{}],
    "EDMEuler": [MIN],
}  # fmt: skip


def _cases(table):
    return [
        pytest.param(name, c, id=f"{name}{i}") for name in table for i, c in enumerate(table[name])
    ]


def _network(x, t, sin):
    """Something like noise where x is: smooth, and told the time."""
    return 0.9 * x + 0.2 * sin(2.0 * x + t / 400.0)


def _apply(hears, x, t, cond, key):
    return _network(x, hears * t.reshape(-1, 1, 1, 1), jnp.sin)


class _Feed:
    """Stands in for diffusers' randn_tensor: DRAWS in order."""

    def __init__(self):
        self.calls = 0

    def __call__(self, shape, **_):
        self.calls += 1
        return torch.tensor(DRAWS[self.calls - 1])


@struct
class Given(Noise):
    """The draws of step `number`, in our layout."""

    draws: jax.Array
    number: jax.Array | int = 0

    def at(self, keys, step):
        """Of the step, counted from 1."""
        return Given(self.draws, step - 1)

    def between(self, x, t, s, part=0):
        """The step's draw."""
        return self.draws[self.number].astype(x.dtype)

    def free(self, x, i=0):
        """The step's draw."""
        return self.draws[self.number].astype(x.dtype)


def _theirs(scheduler, hears, monkeypatch):
    if hasattr(inspect.getmodule(type(scheduler)), "randn_tensor"):
        monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", _Feed())
    scheduler.set_timesteps(N)
    if hasattr(scheduler, "set_begin_index"):  # else equal first times make it skip a step
        scheduler.set_begin_index(0)
    x = torch.tensor(NOISE) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x = scheduler.step(_network(scale(x, t), hears * t, torch.sin), t, x).prev_sample
    return x.numpy()


def _ours(sampler, hears):
    times = sampler.times(N)
    x = sampler.start(jnp.asarray(NOISE).transpose(0, 2, 3, 1), times)
    denoise = denoisers.network(_apply, float(hears), sampler.schedule, sampler.parameterization)
    end = sample(
        jax.random.key(0), sampler.denoiser(denoise), x=x, times=times, solver=sampler.solver,
        noise=Given(jnp.asarray(DRAWS.transpose(0, 1, 3, 4, 2))),
    )  # fmt: skip
    return np.asarray(end).transpose(0, 3, 1, 2), float(sampler.schedule.alpha(times[-1]))


IN_SIGMA = ("Euler", "Heun", "KDPM2", "LMS", "EDM")  # their state is x / alpha


def _read(scheduler):
    return from_config(json.loads(scheduler.to_json_string()))


def _rounding_decides(config):
    """Whether diffusers casts times between steps to integers, in float32."""
    return any(config.items() >= c.items() for c in (EXPONENTIAL, BETA, FLOW)) or (
        config.get("beta_schedule") == "squaredcos_cap_v2"
    )


@pytest.mark.parametrize(("name", "config"), _cases(RUNS))
def test_the_same_noise_gives_the_same_image(name, config, monkeypatch):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    hears = not (name.startswith(("DPM", "UniPC", "DEIS")) and _rounding_decides(config))
    theirs = _theirs(scheduler, hears, monkeypatch)
    ours, alpha = _ours(_read(scheduler), hears)
    if name.startswith(IN_SIGMA):
        ours = ours / alpha
    # diffusers' DEIS takes differences of antiderivatives, which costs it a digit
    tolerance = 1e-4 if name.startswith("DEIS") else 2e-5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def _falling(a):
    """Without repetitions."""
    a = a.numpy().astype(float)
    return a[np.append(True, np.abs(np.diff(a)) > 1e-6 * np.abs(a[1:]))]


@pytest.mark.parametrize(("name", "config"), _cases(RUNS) + _cases(GRIDS))
def test_levels_times_and_start(name, config):
    """Of the noise, of what the network is told, of what noise is multiplied with.

    diffusers makes its tables in float32, which leaves squaredcos_cap_v2's first betas, at 4e-5,
    with three digits.
    """
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    n = N if config in RUNS[name] else 12
    scheduler.set_timesteps(n)
    sampler = _read(scheduler)
    s, times = sampler.schedule, sampler.times(n)
    rtol = 3e-4 if config.get("beta_schedule") == "squaredcos_cap_v2" else 1e-4
    if hasattr(scheduler, "sigmas"):
        flow = "Flow" in name or "use_flow_sigmas" in config
        levels = times if flow else s.sigma_ratio(times)
        np.testing.assert_allclose(levels, _falling(scheduler.sigmas), rtol=rtol, atol=1e-8)

    told = sampler.parameterization.condition_time(s, times[:-1])
    theirs = _falling(scheduler.timesteps[:: 2 if name.startswith("KDPM2") else 1])
    if not (name == "PNDM" and not config.get("skip_prk_steps")):  # its start is half-way
        cast = name.startswith(("DPM", "UniPC", "DEIS")) and _rounding_decides(config)
        shown = scheduler.timesteps.numpy() if cast else theirs
        atol = 1.0 if cast else 1e-2
        np.testing.assert_allclose(told, shown[: len(told)], rtol=1e-5, atol=atol)

    start = sampler.start(jnp.ones(1), times)[0]
    if name.startswith(IN_SIGMA):
        start = start / s.alpha(times[0])
    theirs = getattr(scheduler, "init_noise_sigma", 1.0)
    np.testing.assert_allclose(start, theirs, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_diffusers(name):
    signature = inspect.signature(getattr(diffusers, name).__init__)
    theirs = {k: p.default for k, p in signature.parameters.items() if k != "self"}
    assert CLASSES[name][0] == theirs


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("network", "lowest"), [("FluxTransformer2DModel", 0.1), ("", 1e-3)])
def test_dynamic_shifting_as_the_pipelines_ask_for_it(network, lowest, kind):
    """The shift is linear in the image's tokens, through FLUX's and Qwen-Image's two points."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=0.02, max_shift=0.9
    )
    mu = np.interp(1024, [256, 4096], [0.5, 0.9])
    scheduler.set_timesteps(sigmas=np.linspace(1.0, lowest, N), mu=mu)
    sampler = from_config(json.loads(scheduler.to_json_string()), network)
    times = sampler.times(N, tokens=1024)
    np.testing.assert_allclose(times, scheduler.sigmas, rtol=1e-5)
    scale = 1.0 if network else 1000.0  # FLUX's network takes t, SD3's 1000 t
    told = sampler.parameterization.condition_time(sampler.schedule, times[:-1])
    np.testing.assert_allclose(told, scale / 1000.0 * scheduler.timesteps.numpy(), rtol=1e-5)


def test_z_images_pipeline_shifts_even_times():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / N, N))  # as its pipeline asks
    sampler = from_config(json.loads(scheduler.to_json_string()), "ZImageTransformer2DModel")
    np.testing.assert_allclose(sampler.times(N), scheduler.sigmas, rtol=1e-5)


def test_where_the_docstring_says_that_diffusers_differs_it_does(monkeypatch):
    """A step of DDIM that ends where nobody asks; UniPC's bh1 at the data; DDPM's last noise."""
    ddim = diffusers.DDIMScheduler(timestep_spacing="trailing")
    ddim.set_timesteps(30)
    steps = -np.diff(ddim.timesteps.numpy())
    assert 1000 // 30 == 33 and set(steps) == {33, 34}  # it goes 33 from each

    unipc = diffusers.UniPCMultistepScheduler(solver_type="bh1")
    assert np.all(np.isnan(_theirs(unipc, False, monkeypatch)))
    ours, _ = _ours(_read(unipc), False)
    assert np.all(np.isfinite(ours))

    ddpm = diffusers.DDPMScheduler(timestep_spacing="trailing", variance_type="fixed_large")
    ddpm.set_timesteps(N)
    last, x = ddpm.timesteps[-1], torch.zeros(1, 1, 64, 64)
    monkeypatch.undo()
    end = ddpm.step(x, last, x).prev_sample
    beta = 1 - ddpm.alphas_cumprod[last]
    assert last == 99 and float(end.std()) == pytest.approx(float(beta.sqrt()), rel=0.05)
