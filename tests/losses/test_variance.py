"""The hybrid loss of learned variances against numpy's Gaussians, tables of betas and its minimum.

The reference is written from the tables of DDPM's betas, as the published code has them; ours from
the logSNR.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from closed_forms import x64

from jdiff import UserError, denoisers, losses, schedules
from jdiff.losses.variance import bound_term
from jdiff.predictions import Prediction, parameterization

KEY = jax.random.key(0)
T = 20
BETAS = np.linspace(0.01, 0.3, T)
ABAR = np.cumprod(1 - BETAS)
BEFORE = np.append(1.0, ABAR[:-1])
POSTERIOR = BETAS * (1 - BEFORE) / (1 - ABAR)
CLIPPED = np.append(POSTERIOR[1], POSTERIOR[1:])
MEAN_X0 = BETAS * np.sqrt(BEFORE) / (1 - ABAR)
term = jax.jit(bound_term)
MEAN_XT = (1 - BEFORE) * np.sqrt(1 - BETAS) / (1 - ABAR)


def table():
    return schedules.from_betas(BETAS.tolist())


def reference(x0, x0_hat, eps, share, step):
    """bits of one step (index step - 1), elementwise, float64."""
    i = step - 1
    x_t = np.sqrt(ABAR[i]) * x0 + np.sqrt(1 - ABAR[i]) * eps
    true = MEAN_X0[i] * x0 + MEAN_XT[i] * x_t
    model = MEAN_X0[i] * x0_hat + MEAN_XT[i] * x_t
    log_var = share * np.log(BETAS[i]) + (1 - share) * np.log(CLIPPED[i])
    if step > 1:
        lv = np.log(CLIPPED[i])
        nats = 0.5 * (
            -1 + log_var - lv + np.exp(lv - log_var) + (true - model) ** 2 * np.exp(-log_var)
        )
    else:
        law = scipy.stats.norm(model, np.exp(0.5 * log_var))
        upper = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
        lower = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
        nats = -np.log(law.cdf(upper) - law.cdf(lower))
    return nats / np.log(2)


@x64
def test_every_step_is_the_published_formula():
    rng = np.random.default_rng(0)
    x0 = np.round(rng.uniform(-1, 1, (T, 5)) * 127.5 + 127.5) / 127.5 - 1
    x0[:, 0], x0[:, 1] = -1.0, 1.0
    x0_hat = x0 + 0.1 * rng.standard_normal(x0.shape)
    eps, share = rng.standard_normal(x0.shape), rng.uniform(0, 1, x0.shape)
    made = term(table(), Prediction(x0_hat, eps, share), x0, jnp.arange(1.0, T + 1))
    expected = [
        reference(x0[i], x0_hat[i], eps[i], share[i], i + 1).mean() for i in range(T)
    ]  # fmt: skip
    np.testing.assert_allclose(made, expected, rtol=1e-8)


@x64
def test_the_pixels_probabilities_sum_to_1_and_far_tails_keep_their_digits():
    values = np.arange(256) / 127.5 - 1
    mean = np.full((256, 1), 0.93)
    one = jnp.ones(256)
    bits = term(table(), Prediction(mean, mean, 0.5 + 0 * mean), values[:, None], one)
    assert float(jnp.sum(2.0**-bits)) == pytest.approx(1.0, abs=1e-10)
    narrow = schedules.from_betas([1e-6, 1e-6])  # 2000 deviations away
    far = term(narrow, Prediction(mean * 0 - 0.9, mean, mean), values[:, None], one)
    assert np.isfinite(far).all()
    std = 1e-3 * 0.5**0.035  # share 0.93 between half of beta and beta
    edge = (values[200] - 1 / 255 + 0.9) / std
    assert float(far[200]) == pytest.approx(0.5 * edge**2 / np.log(2), rel=1e-4)


@x64
def test_a_perfect_estimate_with_the_posteriors_variance_costs_nothing():
    t, x0 = jnp.arange(2.0, T + 1), jnp.ones((T - 1, 3)) * 0.3
    loss = lambda share: bound_term(table(), Prediction(x0, x0, share * jnp.ones_like(x0)), x0, t)
    at = jax.jit(lambda share: jax.jvp(loss, (share,), (1.0,)))
    value, slope = at(0.0)
    np.testing.assert_allclose(value, 0.0, atol=1e-14)
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    assert (np.diff([value, at(0.3)[0], at(1.0)[0]], axis=0) > 0).all()


@x64
def test_the_bound_is_least_where_the_variance_is_the_reverse_steps_own():
    """The posterior's plus what x0's uncertainty adds, for which errors of +-deviation stand."""
    t = jnp.arange(2.0, T + 1)
    i = np.arange(1, T)
    left = 0.4 * (1 - ABAR[i]) / (0.4 * ABAR[i] + 1 - ABAR[i])  # Var(x0 | x_t), data N(0, 0.4)
    truth = POSTERIOR[i] + MEAN_X0[i] ** 2 * left
    best = np.log(truth / POSTERIOR[i]) / np.log(BETAS[i] / POSTERIOR[i])
    error = np.sqrt(left)[:, None] * np.array([1.0, -1.0])
    x0 = jnp.zeros((T - 1, 2))

    def loss(share):
        prediction = Prediction(jnp.asarray(error), x0, share[:, None] * jnp.ones((1, 2)))
        return bound_term(table(), prediction, x0, t).sum()

    slope = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(slope(best), 0.0, atol=1e-10)
    assert (slope(best + 0.05) > 1e-6).all()
    assert (slope(best - 0.05) < -1e-6).all()


def network(params, schedule=None, **row):
    """A network whose output is its parameters: [F, v] in the last axis."""
    apply = lambda p, x, t, cond, key: jnp.broadcast_to(p, (*x.shape[:-1], 4))
    row = {"variance": "learned_range"} | row
    schedule = table() if schedule is None else schedule
    return denoisers.network(apply, params, schedule, parameterization("eps", **row))


def test_the_bound_teaches_the_variance_alone_and_l_simple_the_mean():
    """Gradients of the 2 + 2 channels; the weight is lambda T."""
    x0, params = jnp.full((8, 2), 0.25), jnp.asarray([0.3, -0.2, 0.4, -0.6])
    at = lambda key, n, s: jnp.arange(1.0, n + 1)

    @jax.jit
    def run(params, weight):
        total = lambda p: losses.hybrid(
            KEY, network(p), x0, weight=weight, distribution=at
        ).mean()  # fmt: skip
        simple = lambda p: losses.denoising(KEY, network(p), x0, distribution=at).mean()
        return jax.value_and_grad(total)(params), jax.value_and_grad(simple)(params)

    (_, slope), (simple, only) = run(params, 1e-3)
    (value, double), _ = run(params, 2e-3)
    (none, _), _ = run(params, 0.0)
    np.testing.assert_allclose(slope[:2], only[:2], rtol=1e-5)
    np.testing.assert_allclose(only[2:], 0.0)
    assert (np.abs(slope[2:]) > 1e-5).all()
    np.testing.assert_allclose(double[2:], 2 * slope[2:], rtol=1e-4)
    assert float(none) == pytest.approx(float(simple), rel=1e-6)

    eps = np.asarray(losses.normal(jax.random.split(KEY)[1], x0), float)
    i = np.arange(8)[:, None]
    x_t = np.sqrt(ABAR[i]) * 0.25 + np.sqrt(1 - ABAR[i]) * eps
    x0_hat = (x_t - np.sqrt(1 - ABAR[i]) * np.asarray(params[:2])) / np.sqrt(ABAR[i])
    share = 0.5 * (np.asarray(params[2:]) + 1)
    bits = np.stack([reference(0.25, x0_hat[k], eps[k], share, k + 1) for k in range(8)])
    assert float(value - none) == pytest.approx(2e-3 * T * bits.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: network(jnp.zeros(4), variance="fixed"), "the network learns no variance"),
        (lambda: network(jnp.zeros(4), schedules.cosine()), "the schedule Cosine has no steps"),
    ],
)
def test_what_the_discrete_bound_cannot_do_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        losses.hybrid(KEY, call(), jnp.zeros((2, 2)))
