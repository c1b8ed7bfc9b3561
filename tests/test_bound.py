"""The variational bound: above -log p, tight for the exact denoiser on a fine grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, x64

from jdiff import denoisers, schedules
from jdiff.bound import variational_bound

KEY, MANY = jax.random.key(0), 4000
SCHEDULES = {"edm": schedules.edm, "vp": schedules.vp_linear}
X0, MEAN, VARIANCE = 0.8, 0.3, 0.25
EXACT = 0.5 * (X0 - MEAN) ** 2 / VARIANCE + 0.5 * np.log(2 * np.pi * VARIANCE)


def _bound(schedule, steps, low=0.02, high=60.0):
    times = jnp.append(at(schedule, np.geomspace(high, low, steps)), 0.0)
    denoise = denoisers.mixture(jnp.asarray([[MEAN]]), VARIANCE, schedule)
    found = variational_bound(KEY, denoise, jnp.full((MANY, 1), X0), times=times)
    total = np.asarray(found.total)
    return total.mean(), total.std() / np.sqrt(MANY)


@pytest.mark.parametrize("name", SCHEDULES)
@x64
def test_it_falls_to_the_negative_log_density_as_the_grid_grows(name):
    """With the exact denoiser of a Gaussian; never below it, but for the noise of the estimate."""
    gaps = []
    for steps in (20, 80, 320):
        mean, error = _bound(SCHEDULES[name](), steps)
        assert mean > EXACT - 4 * error
        gaps.append(mean - EXACT)
    assert gaps[0] > gaps[1] > gaps[2]
    # First order in the step: what remains at 320 steps is a third of the last change.
    assert abs(gaps[2] - (gaps[1] - gaps[2]) / 3) < 4 * error


@x64
def test_the_parts_in_closed_form():
    """A denoiser that always says 0: every expectation is known."""
    s = schedules.vp_linear()
    times = jnp.append(at(s, [50.0, 3.0, 0.4]), 0.0)
    zero = lambda x, t, cond: denoisers.Prediction(0.0 * x, x)
    x0 = jnp.asarray([[0.5, -1.0], [0.2, 0.1]])
    found = variational_bound(KEY, zero, x0, times=times, schedule=s)
    square, snr = np.sum(np.square(x0), 1), np.array([1 / 50, 1 / 3, 1 / 0.4]) ** 2
    np.testing.assert_allclose(found.prior, 0.5 * snr[0] * square, rtol=1e-6)
    np.testing.assert_allclose(found.diffusion, 0.5 * (snr[2] - snr[0]) * square, rtol=1e-6)


@x64
def test_levels_are_a_distribution():
    """Of 4 levels: summed over the pixel's values, the decoder's probabilities are one."""
    s = schedules.edm()
    times = jnp.asarray([10.0, 0.3, 0.0])
    zero = lambda x, t, cond: denoisers.Prediction(0.0 * x, x)
    values = np.linspace(-1, 1, 4)
    nats = []
    for v in values:  # the same noisy x for every value: x = v + 0.3 eps needs eps moved along
        found = variational_bound(
            KEY, zero, jnp.full((2000, 1), v), times=times, schedule=s, decoder="levels", levels=4
        )
        nats.append(np.asarray(found.reconstruction))
    eps = 0.3 * np.random.default_rng(0).normal(size=200_000)
    for v, found in zip(values, nats):  # E over eps of -log softmax, by an independent hand
        logits = -0.5 * ((v + eps[:, None] - values) / 0.3) ** 2
        log_p = -0.5 * (eps / 0.3) ** 2 - np.log(np.exp(logits).sum(1))
        np.testing.assert_allclose(found.mean(), -log_p.mean(), rtol=0.12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder": "level"}, "Did you mean 'levels'"),
        ({"times": jnp.asarray([1.0, 0.0])}, "at least two noisy times"),
        ({"times": jnp.asarray([0.1, 1.0, 0.0])}, "times must fall"),
        ({"times": jnp.asarray([3.0, 1.0, 0.1])}, "times end at 0.1; the last must be the data"),
    ],
)
def test_what_cannot_be_asked(options, said):
    options = {"times": jnp.asarray([3.0, 1.0, 0.0])} | options
    denoise = denoisers.mixture(jnp.asarray([[0.0]]), 1.0, schedules.edm())
    with pytest.raises(ValueError, match=said):
        variational_bound(KEY, denoise, jnp.zeros((2, 1)), **options)
