"""Likelihoods of known densities, to 1e-3 nats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64

from jdiff import denoisers, likelihood, schedules

KEY = jax.random.key(0)
SCHEDULES = {"edm": schedules.edm, "vp": schedules.vp_linear, "flow": schedules.rectified_flow}
MEANS, VARIANCES = np.array([[-1.0, 0.2], [0.4, 0.8], [1.0, -0.5]]), np.array([0.1, 0.3, 0.05])
WEIGHTS, LABELS = np.array([0.2, 0.5, 0.3]), np.array([0, 1, 0])
X0 = np.array([[0.3, 0.6], [-0.9, 0.1], [2.0, -1.0], [0.9, -0.4]])


def _mixture(schedule):
    return denoisers.mixture(
        jnp.asarray(MEANS), jnp.asarray(VARIANCES), schedule, weights=WEIGHTS, labels=LABELS
    )


def _prior(denoise):
    """The exact marginal at the noise end, so that nothing but the ODE is tested."""
    s = denoise.schedule
    low = jnp.clip(s.logsnr(jnp.asarray(s.t_max)), -20.0, None)
    return lambda x: denoise.log_density(x, s.time(low))


def _log_density(x, added=0.0, keep=slice(None)):
    """The mixture's log density with Gaussian noise of variance `added`, in numpy."""
    m, v, w = MEANS[keep], VARIANCES[keep] + added, WEIGHTS[keep] / WEIGHTS[keep].sum()
    square = ((x[:, None] - m) ** 2).sum(-1)
    return np.log((w * np.exp(-0.5 * square / v) / (2 * np.pi * v)).sum(1))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", SCHEDULES)
@x64
def test_the_density_of_a_mixture_to_a_thousandth_of_a_nat(name, trace):
    """Of the data as they are: the noise at t_min is below the tolerance."""
    s = SCHEDULES[name]()
    last = s.time(2 * np.log(1e3))  # sigma / alpha = 0.001
    denoise = _mixture(s)
    found = likelihood.log_likelihood(
        KEY, denoise, jnp.asarray(X0), trace=trace, probes=1 if trace == "exact" else 64,
        steps=200, last_time=last, prior=_prior(denoise),
    )  # fmt: skip
    error = np.abs(found.log_prob - _log_density(X0))
    assert error.max() < (1e-3 if trace == "exact" else 0.5)
    assert (found.evaluations == 800).all()


@x64
def test_the_prior_that_samplers_start_from_costs_what_the_docstring_says():
    s = schedules.edm(0.001, 80.0)
    denoise = denoisers.mixture(jnp.asarray([[0.5]]), 0.25, s)
    found = likelihood.log_likelihood(KEY, denoise, jnp.asarray([[0.7]]), trace="exact", steps=100)
    gap = float(found.log_prob[0]) + 0.5 * 0.2**2 / 0.25 + 0.5 * np.log(2 * np.pi * 0.25)
    assert 0.1 * 0.5 / 80 < abs(gap) < 0.5 / 80


@x64
def test_adaptive_steps_agree_for_each_sample_alone_and_by_label():
    s = schedules.edm(0.001, 1e4)
    cond = {"label": jnp.asarray([0, 1, 0, 1])}
    options = dict(trace="exact", rtol=1e-7, atol=1e-7)
    found = likelihood.log_likelihood(KEY, _mixture(s), jnp.asarray(X0), cond, **options)
    for i, label in enumerate([0, 1, 0, 1]):
        exact = _log_density(X0[i : i + 1], keep=label == LABELS)
        np.testing.assert_allclose(found.log_prob[i : i + 1], exact, atol=1e-3)
    assert len(set(found.evaluations.tolist())) > 1  # each takes the steps it needs


@x64
def test_a_probe_is_unbiased_and_samples_do_not_share_it():
    """The mean over keys is the exact trace within four standard errors; alone or in a batch."""
    s = schedules.edm(0.01, 100.0)
    x0 = jnp.tile(jnp.asarray(X0[:1]), (400, 1))
    exact = likelihood.log_likelihood(KEY, _mixture(s), x0[:1], trace="exact", steps=40).log_prob[0]
    many = np.asarray(likelihood.log_likelihood(KEY, _mixture(s), x0, steps=40).log_prob)
    assert many.std() > 1e-3
    assert abs(many.mean() - exact) < 4 * many.std() / np.sqrt(len(many))


@x64
def test_a_tree_of_independent_leaves_has_the_sum_of_their_densities():
    s = {"a": schedules.edm(0.001, 1e4), "b": schedules.edm(0.001, 1e4)}
    mean = {"a": jnp.asarray([[0.2]]), "b": jnp.asarray([[0.5, -0.3]])}
    denoise = denoisers.mixture(mean, 0.25, s)
    x0 = {"a": jnp.asarray([[0.7]]), "b": jnp.asarray([[0.1, 0.4]])}
    found = likelihood.log_likelihood(KEY, denoise, x0, trace="exact", steps=200).log_prob
    gaps = np.array([0.5, -0.4, 0.7])
    expected = -0.5 * (gaps**2).sum() / 0.25 - 1.5 * np.log(2 * np.pi * 0.25)
    np.testing.assert_allclose(found, [expected], atol=1e-3)


def test_dequantised_levels_are_uniform_and_bits_count_them():
    """Uniform over 256 levels is 8 bits / dim, whatever the image."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = np.asarray(likelihood.dequantize(KEY, images))
    np.testing.assert_array_equal(np.round((x + 1) * 127.5).astype(int), images)
    assert np.abs((x + 1) * 127.5 - images).max() <= 0.5 and ((x + 1) * 127.5 - images).std() > 0.25
    density = -256 * np.log(2 * 256 / 255)  # uniform on [-1 - 1 / 255, 1 + 1 / 255], a dimension
    np.testing.assert_allclose(likelihood.bits_per_dim(jnp.asarray([density]), x), 8.0, rtol=1e-5)


def test_bits_of_continuous_data_are_nats_over_log_2():
    np.testing.assert_allclose(
        likelihood.bits_per_dim(jnp.asarray([-3.0]), jnp.zeros((1, 6)), levels=None),
        0.5 / np.log(2),
    )


def test_a_caller_may_compile_it():
    """The denoiser, and with it the schedule's ends, an argument of the caller's program."""
    s, x0 = schedules.edm(0.01, 100.0), jnp.asarray(X0)
    found = lambda d: likelihood.log_likelihood(KEY, d, x0, trace="exact", steps=4).log_prob
    np.testing.assert_allclose(jax.jit(found)(_mixture(s)), found(_mixture(s)), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trace": "exat"}, "Did you mean 'exact'"),
        ({"first_time": 0.01, "last_time": 1.0}, "must be noisier than last_time=1.0"),
    ],
)
def test_what_cannot_be_asked(options, said):
    with pytest.raises(ValueError, match=said):
        likelihood.log_likelihood(KEY, _mixture(schedules.edm()), jnp.asarray(X0), **options)
