"""DPS: its gradient for normal data, by hand; linear and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, x64

from jdiff import denoisers, grids, guidance, operators, sample, sampling, solvers
from jdiff.errors import UserError

RANDOM = np.random.default_rng(2)
A, MEAN, V = RANDOM.normal(size=(3, 4)), RANDOM.normal(size=4), 0.49
X, Y = RANDOM.normal(size=(2, 4)), RANDOM.normal(size=(2, 3))

CALL = jax.jit(lambda denoise, x, t, y: denoise(x, t, {"y": y}))


def denoiser(schedule):
    return denoisers.mixture(jnp.asarray(MEAN)[None], V, schedule)


@pytest.mark.parametrize("noise", [None, 0.3])
@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow"])
@x64
def test_the_score_gains_the_gradient_in_closed_form(name, noise):
    schedule = SCHEDULES[name]()
    t = at(schedule, [0.2, 3.0])
    operator = operators.matrix(A, (4,))
    made = CALL(guidance.dps(denoiser(schedule), operator, 1.5, noise), X, t, Y)
    for i in range(2):
        alpha, sigma = (float(f(t[i])) for f in (schedule.alpha, schedule.sigma))
        spread = alpha**2 * V + sigma**2
        slope = alpha * V / spread  # d x0 / d x
        x0 = MEAN + slope * (X[i] - alpha * MEAN)
        score = -(X[i] - alpha * MEAN) / spread
        r = Y[i] - A @ x0
        g = slope * A.T @ r / (np.linalg.norm(r) if noise is None else noise**2)
        score = score + 1.5 * g
        np.testing.assert_allclose(made.eps[i], -sigma * score, rtol=1e-9)
        np.testing.assert_allclose(made.x0[i], (X[i] + sigma**2 * score) / alpha, rtol=1e-9)


@x64
def test_the_operator_may_be_any_function():
    schedule = SCHEDULES["edm"]()
    t = jnp.asarray([0.5, 0.5])
    square = operators.function(lambda x: {"square": x**2})
    made = CALL(guidance.dps(denoiser(schedule), square, noise=1.0), X, t, {"square": X})
    slope = V / (V + 0.25)
    x0 = MEAN + slope * (X - MEAN)
    g = slope * 2 * x0 * (X - x0**2)
    np.testing.assert_allclose(made.x0, x0 + 0.25 * g, rtol=1e-9)


def test_a_met_measurement_changes_nothing():
    """Where the residual is 0 its norm has no gradient, and none is taken."""
    schedule = SCHEDULES["edm"]()
    met = operators.function(lambda x: 0.0 * x)
    made = CALL(guidance.dps(denoiser(schedule), met), X, jnp.ones(2), np.zeros((2, 4)))
    np.testing.assert_allclose(made.x0, MEAN + V / (V + 1) * (X - MEAN), rtol=1e-5)


def test_measurements_follow_their_sample_through_the_chunks_and_scales_do_not_recompile():
    schedule, operator = SCHEDULES["edm"](), operators.matrix(A, (4,))
    y = jnp.asarray(RANDOM.normal(size=(5, 3)))

    def draw(scale, **changes):
        guided = guidance.dps(denoiser(schedule), operator, scale)
        settings = dict(shape=(4,), solver=solvers.ddim(), times=grids.karras(schedule, 4))
        return sample(jax.random.key(0), guided, **(settings | {"cond": {"y": y}} | changes))

    chunked = draw(1.0, batch=2)
    one = draw(1.0, cond={"y": y[jnp.asarray([3, 3])]}, ids=jnp.asarray([3, 3]))
    np.testing.assert_allclose(chunked[3], one[0], rtol=1e-4, atol=1e-5)
    compiled = sampling._run._cache_size()
    other = draw(2.0, batch=2)
    assert sampling._run._cache_size() == compiled
    assert np.abs(other - chunked).max() > 1e-3


def test_dps_that_cannot_work_is_refused():
    denoise, operator = denoiser(SCHEDULES["edm"]()), operators.matrix(A, (4,))
    with pytest.raises(UserError, match="noise=0"):
        guidance.dps(denoise, operator, noise=0)
    with pytest.raises(UserError, match="'y' is not known"):
        guidance.dps(denoise, operator)(X, jnp.ones(2), {"label": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"y has shape \(2, 4\), the operator makes \(2, 3\)"):
        guidance.dps(denoise, operator)(X, jnp.ones(2), {"y": X})
