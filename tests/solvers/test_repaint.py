"""RePaint: known pixels are kept, the others follow its own recursion, nearing the posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES

from jdiff import denoisers, grids, sample, schedules, solvers
from jdiff.errors import UserError
from jdiff.predictions import from_x0

#: Two pixels, correlated; the first is known to be 1.
C = np.array([[1.0, 0.8], [0.8, 1.0]])
KEEP = np.array([True, False])
SCHEDULE = SCHEDULES["vp_linear"]()
CONDITIONAL = 0.8, 1 - 0.8**2  # mean and variance of the second given the first


def exact(x, t, cond):
    """E[x0 | x_t] of N(0, C)."""
    alpha, sigma = SCHEDULE.alpha(t)[:, None, None], SCHEDULE.sigma(t)[:, None, None]
    gain = (
        alpha * jnp.asarray(C) @ jnp.linalg.inv(alpha**2 * jnp.asarray(C) + sigma**2 * jnp.eye(2))
    )
    return from_x0(SCHEDULE, x, (gain @ x[..., None])[..., 0], t)


def moments(times, resample, jump):
    """Mean and covariance of RePaint's result, in numpy: each of its moves is affine and normal."""

    def level(t):  # Song et al. 2021, beta from 0.1 to 20
        alpha = np.exp(-0.25 * 19.9 * t**2 - 0.05 * t)
        return alpha, np.sqrt(1 - alpha**2)

    alpha, sigma = level(times[0])
    mean, cov = np.zeros(2), sigma**2 * np.eye(2)
    free = np.diag(1.0 - KEEP)
    for t, s in zip(times[:-1], times[1:]):
        sub = np.linspace(t, s, jump + 1)
        for k in range(resample):
            if k:  # q(x_t | x_s)
                (at, st), (a_s, ss) = level(t), level(s)
                mean, cov = at / a_s * mean, (at / a_s) ** 2 * cov
                cov = cov + (st**2 - (at * ss / a_s) ** 2) * np.eye(2)
            for now, then in zip(sub[:-1], sub[1:]):
                (a, b), (c, d) = level(now), level(then)
                x0 = a * C @ np.linalg.inv(a**2 * C + b**2 * np.eye(2))
                # q(x_then | x_now, x0): Ho et al. 2020, equation 7, with beta = 1 - (a / c)^2
                beta = b**2 - (a / c * d) ** 2
                step = c * beta / b**2 * x0 + (a / c) * d**2 / b**2 * np.eye(2)
                mean, cov = step @ mean, step @ cov @ step.T + d**2 * beta / b**2 * np.eye(2)
                known = np.diag(KEEP.astype(float))
                mean = free @ mean + c * known @ np.ones(2)
                cov = free @ cov @ free + d**2 * known
    return mean, cov


def draw(num, resample, jump, n, **changes):
    return sample(
        jax.random.key(0), denoisers.function(exact, SCHEDULE), shape=(2,), num=num,
        cond={"y": jnp.broadcast_to(jnp.asarray([1.0, 99.0]), (num, 2))},
        times=grids.uniform(SCHEDULE, n),
        solver=solvers.repaint(KEEP, resample=resample, jump=jump, **changes),
    )  # fmt: skip


def test_data_at_no_finite_time_is_reached_by_whole_steps_alone():
    """On VE, whose t runs to -inf: the known pixels of the result are y's."""
    s, y = schedules.ve(), jnp.asarray([[1.0, 99.0]])
    exactly = denoisers.mixture(jnp.zeros((1, 2)), 1.0, s)
    run = lambda **options: sample(
        jax.random.key(0), exactly, shape=(2,), num=1, cond={"y": y}, times=grids.karras(s, 3),
        solver=solvers.repaint(KEEP, resample=2, **options),
    )  # fmt: skip
    found = run()
    assert found[0, 0] == 1.0 and np.isfinite(found).all()
    with pytest.raises(UserError, match=r"repaint: jump=2 divides .* times\[-1\] is -inf"):
        run(jump=2)


@pytest.mark.parametrize(("resample", "jump"), [(1, 1), (3, 2)])
def test_samples_have_the_moments_of_the_algorithm(resample, jump):
    num, n = 20_000, 6
    out = np.asarray(draw(num, resample, jump, n))
    mean, cov = moments(np.asarray(grids.uniform(SCHEDULE, n)), resample, jump)
    np.testing.assert_array_equal(out[:, 0], 1.0)
    assert cov[0, 0] == 0
    error = np.sqrt(cov[1, 1] / num)
    assert abs(out[:, 1].mean() - mean[1]) < 5 * error
    assert out[:, 1].var() == pytest.approx(cov[1, 1], rel=5 * np.sqrt(2 / num))


def test_resampling_nears_the_conditional_distribution():
    """The mean's error halves as the passes double; the variance is right on a fine grid.

    On a coarse one it falls below, the more the more passes there are: each first-order step adds
    the posterior's variance given x0, which lacks that of x0 itself.
    """
    fine, coarse = (np.linspace(1, 0, n + 1) for n in (400, 50))
    found = {r: moments(fine, r, 1) for r in (1, 2, 4, 8)}
    gaps = np.array([abs(mean[1] - CONDITIONAL[0]) for mean, _ in found.values()])
    assert gaps[0] > 0.25
    assert (gaps[1:] < 0.6 * gaps[:-1]).all()
    assert found[1][1][1, 1] > 0.45
    assert found[8][1][1, 1] == pytest.approx(CONDITIONAL[1], abs=0.02)
    assert moments(coarse, 8, 1)[1][1, 1] < 0.3


def test_calls_are_counted_and_a_steps_first_prediction_is_observed():
    calls = []

    def counted(x, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        assert cond == {}  # y is not shown
        return exact(x, t, cond)

    solver = solvers.repaint(KEEP, inner=solvers.ddim(), resample=3, jump=2)
    _, path = sample(
        jax.random.key(0), denoisers.function(counted, SCHEDULE), shape=(2,), solver=solver,
        cond={"y": jnp.ones((1, 2))}, times=grids.uniform(SCHEDULE, 2), observe=_observe,
    )  # fmt: skip
    jax.effects_barrier()
    assert len(calls) == solver.count(2) == 6 + 3 * (1 + 1)
    for x, t, x0 in zip(*(np.asarray(a) for a in path)):
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        wanted = alpha * C @ np.linalg.inv(alpha**2 * C + sigma**2 * np.eye(2)) @ x[0]
        np.testing.assert_allclose(x0[0], wanted, rtol=1e-4, atol=1e-5)


def _observe(x, t, prediction):
    return x, t, prediction.x0


@pytest.mark.parametrize("changes", [{"resample": 0}, {"jump": 1.5}])
def test_counts_that_are_none_are_refused(changes):
    with pytest.raises(UserError, match=r"repaint: \w+=.* whole number"):
        solvers.repaint(KEEP, **changes)
