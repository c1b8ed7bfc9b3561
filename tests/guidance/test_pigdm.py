"""PiGDM is Bayes' rule for normal data and linear measurements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, x64

from jdiff import denoisers, grids, guidance, operators, sample, solvers
from jdiff.errors import UserError
from jdiff.predictions import corrupt

RANDOM = np.random.default_rng(1)
A, MEAN, V = RANDOM.normal(size=(3, 4)), RANDOM.normal(size=4), 0.49
Y = RANDOM.normal(size=(2, 3))


def posterior(mean, r2, y, noise):
    """Of x0 ~ N(mean, r2 I) given y = A x0 + noise n: mean and covariance, in numpy."""
    gain = r2 * A.T @ np.linalg.inv(r2 * A @ A.T + noise**2 * np.eye(3))
    return mean + gain @ (y - A @ mean), r2 * (np.eye(4) - gain @ A)


def denoiser(schedule):
    return denoisers.mixture(jnp.asarray(MEAN).reshape(1, 2, 2), V, schedule)


@pytest.mark.parametrize("name", ["edm", "vp_linear", "rectified_flow"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@x64
def test_the_guided_mean_is_the_posterior_mean(name, noise):
    schedule = SCHEDULES[name]()
    x = RANDOM.normal(size=(2, 2, 2))
    t = at(schedule, [0.2, 3.0])
    guided = guidance.pigdm(
        denoiser(schedule), operators.matrix(A, (2, 2)), noise=noise, variance=V
    )
    made = jax.jit(lambda d, x, t, y: d(x, t, {"y": y}))(guided, jnp.asarray(x), t, jnp.asarray(Y))
    for i in range(2):
        alpha, sigma = (float(f(t[i])) for f in (schedule.alpha, schedule.sigma))
        spread = alpha**2 * V + sigma**2
        plain = MEAN + alpha * V / spread * (x[i].ravel() - alpha * MEAN)
        wanted, _ = posterior(plain, V * sigma**2 / spread, Y[i], noise)
        np.testing.assert_allclose(made.x0[i].ravel(), wanted, rtol=1e-9)
    np.testing.assert_allclose(corrupt(schedule, made.x0, made.eps, t), x, rtol=1e-9)


@x64
def test_sampling_with_it_draws_from_the_posterior():
    """The ODE is affine for normal data: five starts tell the mean and covariance of all."""
    schedule, noise = SCHEDULES["edm"](), 0.3
    guided = guidance.pigdm(
        denoiser(schedule), operators.matrix(A, (2, 2)), noise=noise, variance=V
    )
    wanted_mean, wanted_covariance = posterior(MEAN, V, Y[0], noise)
    start = wanted_mean + np.concatenate([np.zeros((1, 4)), 80.0 * np.eye(4)])  # the ODE's centre
    start = jnp.asarray(start.reshape(5, 2, 2))
    y = jnp.broadcast_to(Y[0], (5, 3))
    times = grids.karras(schedule, 120)
    out = sample(
        jax.random.key(0), guided, x=start, cond={"y": y}, times=times, solver=solvers.heun()
    ).reshape(5, 4)
    mean, factor = out[0], (out[1:] - out[0]).T
    np.testing.assert_allclose(mean, wanted_mean, atol=2e-3)
    np.testing.assert_allclose(factor @ factor.T, wanted_covariance, atol=2e-3)
    assert np.abs(wanted_covariance - V * np.eye(4)).max() > 0.3


@x64
def test_a_function_with_a_pseudo_inverse_is_guided_as_the_operator_it_is():
    schedule, t = SCHEDULES["vp_linear"](), at(SCHEDULES["vp_linear"](), [0.5, 2.0])
    inverse = jnp.asarray(np.linalg.pinv(A))
    forward = lambda x: x.reshape(-1, 4) @ A.T
    function = operators.function(forward, lambda y: (y @ inverse.T).reshape(-1, 2, 2))
    x, cond = jnp.asarray(RANDOM.normal(size=(2, 2, 2))), {"y": jnp.asarray(Y)}
    pair = [
        guidance.pigdm(denoiser(schedule), operator, variance=V)
        for operator in (function, operators.matrix(A, (2, 2)))
    ]
    made, wanted = jax.jit(lambda pair: [d(x, t, cond) for d in pair])(pair)
    np.testing.assert_allclose(made.x0, wanted.x0, rtol=1e-9)


def test_pigdm_that_cannot_work_is_refused():
    denoise = denoiser(SCHEDULES["edm"]())
    square = lambda x: x**2
    with pytest.raises(UserError, match="no pseudo-inverse; .* or dps"):
        guidance.pigdm(denoise, square)
    with pytest.raises(UserError, match="noise needs a linear operator"):
        guidance.pigdm(denoise, operators.function(square, jnp.sqrt), noise=0.1)
    with pytest.raises(UserError, match="noise=-1"):
        guidance.pigdm(denoise, operators.matrix(A, (2, 2)), noise=-1)
    with pytest.raises(UserError, match="pigdm: .* schedule"):
        guidance.pigdm(lambda *_: 0, operators.matrix(A, (2, 2)))
