"""Paths, targets and couplings against torchcfm and flow_matching, on the same points and times.

Their time is 1 - t and their velocity minus ours; their x_1 is our x0, the data. Where they add
1e-8 to a denominator (the bridge's velocity), the tolerance has room for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64
from peers import peer

from jdiff import couplings, distributions, interpolants, schedules, weightings
from jdiff.predictions import Prediction, convert, corrupt, endpoint_velocity, parameterization

torch = peer("torch")
cfm = peer("torchcfm.conditional_flow_matching")
transport = peer("torchcfm.optimal_transport")

RNG = np.random.default_rng(0)
DATA, OTHER, Z = RNG.standard_normal((3, 16, 3))
S = RNG.uniform(0.05, 0.95, 16)  # their time
KEY = jax.random.key(0)

FLOWS = {
    "I-CFM": (cfm.ConditionalFlowMatcher(0.3), interpolants.straight(0.3)),
    "I-CFM without noise": (cfm.ConditionalFlowMatcher(0.0), interpolants.straight()),
    "FM": (cfm.TargetConditionalFlowMatcher(0.1), interpolants.target(0.1)),
    "SB-CFM": (cfm.SchrodingerBridgeConditionalFlowMatcher(0.7), interpolants.bridge(0.7)),
    "VP-CFM": (cfm.VariancePreservingConditionalFlowMatcher(), interpolants.trigonometric()),
}


@pytest.mark.parametrize("name", FLOWS)
@x64
def test_conditional_paths_and_targets_are_torchcfms(name):
    """FM's other endpoint is the noise itself: torchcfm draws it as epsilon and ignores x_0."""
    theirs, path = FLOWS[name]
    data, other, z, s = (torch.tensor(a) for a in (DATA, OTHER, Z, S))
    point = theirs.sample_xt(other, data, s, other if name == "FM" else z)
    velocity = theirs.compute_conditional_flow(other, data, s, point)
    t = 1 - S
    tolerance = dict(rtol=1e-6, atol=1e-6) if name == "SB-CFM" else dict(rtol=1e-10)
    np.testing.assert_allclose(path.position(DATA, OTHER, Z, t), point, **tolerance)
    np.testing.assert_allclose(path.velocity(DATA, OTHER, Z, t), -velocity, **tolerance)


@x64
def test_the_bridges_latent_noise_is_sf2ms_score():
    """torchcfm's score loss is ||lambda s + z||, lambda = 2 sigma_t / sigma^2; s is -z / gamma."""
    theirs, path = FLOWS["SB-CFM"]
    weight = theirs.compute_lambda(torch.tensor(S)).numpy()[:, None]
    score = np.asarray(path.score(Z, jnp.asarray(1 - S)))
    np.testing.assert_allclose(weight * 0.7**2 / 2 * score, -Z, rtol=1e-6)


def _batches(b=64):
    rng = np.random.default_rng(1)
    return (rng.standard_normal((b, 2)) + [2, 0]).astype(np.float32), rng.standard_normal(
        (b, 2)
    ).astype(np.float32)


def test_the_exact_couplings_cost_is_pots():
    x0, eps = _batches()
    plan = transport.OTPlanSampler("exact").get_map(torch.tensor(x0), torch.tensor(eps))
    cost = np.square(x0[:, None].astype(float) - eps[None]).sum(-1)
    _, matched, _ = couplings.ot()(KEY, jnp.asarray(x0), jnp.asarray(eps))
    ours = np.square(x0 - np.asarray(matched, float)).sum(1).mean()
    assert ours == pytest.approx(float((plan * cost).sum()), rel=1e-6)


@x64
def test_the_entropic_plan_is_pots():
    """To the solvers' tolerances: POT stops at 1e-9 in the marginals, ott-jax at 1e-3."""
    peer("ott")
    x0, eps = (a.astype(float) for a in _batches())
    plan = transport.OTPlanSampler("sinkhorn", reg=0.98).get_map(
        torch.tensor(x0), torch.tensor(eps)
    )
    ours = np.exp(couplings.sinkhorn(0.98).log_plan(jnp.asarray(x0), jnp.asarray(eps)))
    np.testing.assert_allclose(ours, plan, atol=2e-3 * plan.max())


# flow_matching: affine paths by schedule, and its conversions between what a network predicts.
fm = peer("flow_matching.path.scheduler.scheduler")
affine = peer("flow_matching.path.affine")

SCHEDULERS = {
    "CondOT": (fm.CondOTScheduler(), schedules.rectified_flow()),
    "Polynomial": (fm.PolynomialConvexScheduler(3), schedules.polynomial(3.0)),
    "VP": (fm.VPScheduler(0.1, 20.0), schedules.vp_linear(0.1, 20.0)),
    "Cosine": (fm.CosineScheduler(), schedules.gvp()),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@x64
def test_affine_paths_are_flow_matchings(name):
    theirs, s = SCHEDULERS[name]
    data, noise, when = (torch.tensor(a) for a in (DATA, OTHER, S))
    path = affine.AffineProbPath(theirs)
    sample = path.sample(x_0=noise, x_1=data, t=when)
    t = jnp.asarray(1 - S)
    x = corrupt(s, DATA, OTHER, t)
    np.testing.assert_allclose(x, sample.x_t, rtol=1e-9)
    velocity = endpoint_velocity(s, Prediction(DATA, OTHER), t)
    np.testing.assert_allclose(velocity, -sample.dx_t, rtol=1e-9)
    rows = {n: parameterization(n) for n in ("x0", "eps", "velocity")}
    at = lambda source, to, value: np.asarray(convert(value, rows[source], rows[to], s, x, t))
    when = when[:, None]
    for made, expected in (
        (at("x0", "velocity", DATA), -path.target_to_velocity(data, sample.x_t, when)),
        (at("eps", "velocity", OTHER), -path.epsilon_to_velocity(noise, sample.x_t, when)),
        (at("velocity", "x0", velocity), path.velocity_to_target(sample.dx_t, sample.x_t, when)),
        (at("velocity", "eps", velocity), path.velocity_to_epsilon(sample.dx_t, sample.x_t, when)),
    ):
        np.testing.assert_allclose(made, expected, rtol=1e-8)


@x64
def test_sd3s_times_and_weights_are_diffusers():
    training = peer("diffusers.training_utils")
    s, t = schedules.rectified_flow(), torch.tensor(S)
    theirs = training.compute_loss_weighting_for_sd3("cosmap", t)
    made = weightings.sd3(distributions.cosmap())(s, S) / weightings.velocity()(s, S)
    np.testing.assert_allclose(made, theirs, rtol=1e-10)
    draw = lambda name, **k: training.compute_density_for_timestep_sampling(
        name, 16, generator=torch.Generator().manual_seed(0), **k
    ).numpy()  # fmt: skip
    u = draw("none")  # the uniforms that "mode" then maps, falling where ours rises
    made = distributions.mode(1.29).quantile(1.0 - u)
    np.testing.assert_allclose(made, draw("mode", mode_scale=1.29), rtol=1e-4)
