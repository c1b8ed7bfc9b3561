"""Guidance against diffusers' guiders on the same random predictions.

diffusers guides whatever the network put out; here that is the target space named in each test, on
rectified flow, where x0 = x - t v. Its `use_original_formulation` is Ho and Salimans' w = ours - 1.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import peer

from jdiff import denoisers, guidance, schedules, solvers
from jdiff.guidance.base import from_target, to_target
from jdiff.noise import fresh
from jdiff.predictions import Prediction

guiders = peer("diffusers.guiders")
torch = peer("torch")

FLOW = schedules.rectified_flow()
RNG = np.random.default_rng(0)
GOOD, BAD, X = (RNG.normal(size=(3, 4, 8, 6)).astype("f4") for _ in range(3))  # NCHW
GOOD *= np.array([1.0, 3.0, 0.5], "f4")[:, None, None, None]
T = jnp.asarray([0.3, 0.6, 0.9])
NULL = {"label": 1}
COND = {"label": jnp.zeros(3, jnp.int32)}
EMPTY = Prediction(None, None)


def nhwc(a):
    return jnp.asarray(np.moveaxis(np.asarray(a), 1, -1))


def denoiser(target, good=GOOD, bad=BAD):
    """Puts out `good` in the target's space for label 0 and `bad` for the null."""

    def denoise(x, t, cond):
        null = (cond["label"] == 1)[:, None, None, None]
        n = len(x) // len(good)
        value = jnp.where(null, *(jnp.repeat(nhwc(a), n, 0) for a in (bad, good)))
        return from_target(target, FLOW, value, x, t, EMPTY)

    return denoisers.function(denoise, FLOW)


def ours(wrap, target, scale, t=T):
    guided = wrap(guidance.cfg(denoiser(target), scale, NULL))
    return np.moveaxis(to_target(target, FLOW, guided(nhwc(X), t, COND), t), -1, 1)


def theirs(guider, step=5):
    guider.set_state(step=step, num_inference_steps=10, timestep=None)
    guider.prepare_inputs({})
    return guider.forward(torch.tensor(GOOD), torch.tensor(BAD)).pred.numpy()


def agree(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("target", ["velocity", "x0", "v"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_cfg_in_both_formulations_and_rescaled_in_the_networks_space(target, rescale):
    wrap = lambda d: guidance.rescale(d, rescale, target)
    made = ours(wrap, target, 4.0)
    kind = guiders.ClassifierFreeGuidance
    agree(made, theirs(kind(guidance_scale=4.0, guidance_rescale=rescale)))
    original = kind(guidance_scale=3.0, guidance_rescale=rescale, use_original_formulation=True)
    agree(made, theirs(original))


def test_autoguidance_is_the_same_extrapolation():
    good, bad = (guidance.fixed(denoiser("x0"), {"label": k}) for k in (0, 1))
    made = guidance.autoguidance(good, bad, 2.5)(nhwc(X), T).x0
    guider = guiders.AutoGuidance(guidance_scale=2.5, auto_guidance_layers=0, dropout=1.0)
    agree(np.moveaxis(made, -1, 1), theirs(guider))


def test_cfg_zero_star_and_its_first_steps():
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=2)
    wrap = lambda d: guidance.zero_init(guidance.cfg_zero(d), 0.15)  # (2 - 1/2) of 10 steps
    agree(ours(wrap, "velocity", 4.0, 0.8 * T), theirs(guider, step=5))
    for step, zero in ((0, True), (1, True), (2, False)):
        made = ours(wrap, "velocity", 4.0, jnp.full(3, 1.0 - step / 10))
        assert (np.abs(made).max() < 1e-5) == zero
        agree(made, theirs(guider, step), 1e-5 if not zero else 1.0)
        assert (np.abs(theirs(guider, step)).max() == 0) == zero


@pytest.mark.parametrize(("eta", "norm"), [(1.0, 1e9), (0.0, 1e9), (0.3, 5.0), (0.0, 5.0)])
def test_adaptive_projected_guidance_in_the_papers_formulation(eta, norm):
    """diffusers' default adds w times the projected difference to the null and not to the paper's
    good: at w = 1 that is not the conditional model unless nothing was projected."""
    settings = dict(eta=eta, adaptive_projected_guidance_rescale=norm)
    made = ours(lambda d: guidance.apg(d, eta, norm), "x0", 4.0)
    kind = guiders.AdaptiveProjectedGuidance
    agree(made, theirs(kind(guidance_scale=3.0, use_original_formulation=True, **settings)), 1e-4)
    default = theirs(kind(guidance_scale=4.0, **settings))
    assert (np.abs(default - made).max() < 1e-3) == (eta == 1.0 and norm > 100)


def test_momentum_between_steps_is_diffusers_buffer():
    kind = guiders.AdaptiveProjectedGuidance
    guider = kind(
        guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.0,
        adaptive_projected_guidance_rescale=20.0, use_original_formulation=True,
    )  # fmt: skip
    solver = guidance.with_momentum(solvers.ddim(), -0.5)
    times = jnp.linspace(0.9, 0.1, 4)
    x, noise = nhwc(X), fresh().at(jax.random.split(jax.random.key(0), 3), 0)
    memory = solver.init(x, times)
    for i in range(3):
        good, bad = (RNG.normal(size=X.shape).astype("f4") for _ in range(2))
        guided = guidance.apg(guidance.cfg(denoiser("x0", good, bad), 4.0, NULL), 0.0, 20.0)
        x, memory, prediction = solver.step(
            guided, FLOW, x, memory, times[i], times[i + 1], noise, COND
        )
        guider.set_state(step=i, num_inference_steps=3, timestep=None)
        guider.prepare_inputs({})
        wanted = guider.forward(torch.tensor(good), torch.tensor(bad)).pred.numpy()
        agree(np.moveaxis(prediction.x0, -1, 1), wanted, 1e-4)


@pytest.mark.parametrize("target", ["velocity", "v", "x0"])
def test_tangential_guidance_by_the_gram_matrix_is_that_by_the_svd(target):
    made = ours(lambda d: guidance.tangential(d, target), target, 4.0)
    agree(made, theirs(guiders.TangentialClassifierFreeGuidance(guidance_scale=4.0)), 1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.7, 8.0])
def test_magnitude_aware_guidance(damping):
    """diffusers' norm refuses images, whose sample has three axes; it is given two."""
    made = ours(lambda d: guidance.magnitude(d, damping), "velocity", 4.0)
    guider = guiders.MagnitudeAwareGuidance(guidance_scale=4.0, alpha=damping)
    flat = [torch.tensor(a.reshape(3, 4, -1)) for a in (GOOD, BAD)]
    agree(made.reshape(3, 4, -1), guider.forward(*flat).pred.numpy())


def test_frequency_decoupled_guidance_with_its_scales_from_high_to_low(monkeypatch):
    """Its pyramids are kornia's; here they are written in torch, and handed to it."""
    module = importlib.import_module("diffusers.guiders.frequency_decoupled_guidance")
    F = torch.nn.functional
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(row, row).expand(4, 1, 5, 5)
    blur = lambda a: F.conv2d(F.pad(a, (2, 2, 2, 2), mode="reflect"), kernel, groups=4)
    resize = lambda a, f: F.interpolate(a, scale_factor=f, mode="bilinear", align_corners=False)
    up = lambda a: blur(resize(a, 2))

    def pyramid(a, levels):
        down = resize(blur(a), 0.5)
        return [a - up(down), down]

    monkeypatch.setattr(module, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(module, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(module, "upsample_and_blur_func", up)
    guider = module.FrequencyDecoupledGuidance(guidance_scales=[10.0, 5.0])
    agree(ours(lambda d: guidance.frequency(d, 4 / 9), "x0", 10.0), theirs(guider))


@pytest.mark.parametrize("quantile", [0.9, 0.995])
def test_dynamic_thresholding_where_diffusers_cap_is_out_of_the_way(quantile):
    """Its `sample_max_value` also caps the quantile from above; at its default 1 that is plain
    clipping, which Imagen's is not."""
    DDPMScheduler = peer("diffusers").DDPMScheduler
    scheduler = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e9
    )
    made = guidance.dynamic_threshold(
        guidance.fixed(denoiser("x0"), {"label": 0}), quantile
    )(nhwc(X), T).x0  # fmt: skip
    agree(np.moveaxis(made, -1, 1), scheduler._threshold_sample(torch.tensor(GOOD)).numpy())
