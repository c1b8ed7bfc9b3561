"""Restarts: jumps of exact marginals, in closed form, at the right place and so many times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, x64

from jdiff import denoisers, grids, sample, schedules, solvers
from jdiff.noise import Fresh
from jdiff.predictions import from_x0
from jdiff.solvers import restart

KEY = jax.random.key(7)
MANY = 20_000
SCHEDULES = {"vp": schedules.vp_linear, "edm": schedules.edm, "flow": schedules.rectified_flow}


@jax.jit
def _step(solver, denoise, x, times):
    """The step from times[0] to times[1] of a longer grid."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(len(x)))
    memory = solver.init(x, times)
    return solver.step(denoise, denoise.schedule, x, memory, *times[:2], Fresh(keys), {})[0]


@pytest.mark.parametrize("name", SCHEDULES)
@x64
def test_around_one_data_point_a_restart_forgets_the_share_it_renews(name):
    """There DDIM is exact, so noise e in x = alpha m + sigma e becomes rho^K e + fresh noise.

    rho = low / high of each of K restarts; the fresh noise has variance 1 - rho^2 times S_noise^2
    for one restart, and 1 - rho^(2 K) for K of them. Any number of steps down.
    """
    s, point = SCHEDULES[name](), 0.7
    denoise = denoisers.mixture(jnp.asarray([[point]]), 0.0, s)
    times = jnp.append(at(s, [4.0, 0.5]), 0.0)
    alpha, sigma = s.alpha(times), s.sigma(times)
    for count, s_noise in ((3, 1.0), (1, 1.2)):
        solver = restart(solvers.euler("sigma"), [(0.45, 0.8, 2, count)], noise=s_noise)
        ends = []
        for e in (0.0, 1.0):
            x = jnp.full((MANY, 1), alpha[0] * point + sigma[0] * e)
            ends.append((_step(solver, denoise, x, times) - alpha[1] * point) / sigma[1])
        rho = 0.5 / 0.8
        np.testing.assert_allclose(ends[1] - ends[0], rho**count, rtol=1e-7)
        expected = s_noise * np.sqrt(1 - rho ** (2 * count))
        np.testing.assert_allclose(ends[0].std(), expected, rtol=4 / np.sqrt(2 * MANY))
        np.testing.assert_allclose(ends[0].mean(), 0.0, atol=4 * expected / np.sqrt(MANY))


def test_samples_of_a_gaussian_are_of_that_gaussian():
    """N(0.4, 0.3) within four standard errors and the solver's own error."""
    s, num = schedules.vp_linear(), 8192
    denoise = denoisers.mixture(jnp.asarray([[0.4]]), 0.3, s)
    times = jnp.append(at(s, np.geomspace(60.0, 0.01, 60)), 0.0)
    solver = restart(solvers.heun(), [(0.1, 0.5, 6, 3), (1.0, 5.0, 6, 2)])
    x = sample(KEY, denoise, shape=(1,), num=num, times=times, solver=solver)
    assert float(x.mean()) == pytest.approx(0.4, abs=4 * np.sqrt(0.3 / num) + 0.005)
    assert float(x.std()) == pytest.approx(np.sqrt(0.3), rel=4 / np.sqrt(2 * num) + 0.02)


@pytest.mark.parametrize("inner", ["heun", "lms"])
def test_restarts_are_where_the_grid_is_nearest_and_cost_what_is_counted(inner):
    s, seen = schedules.edm(), []

    def denoise(x, t, cond):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return from_x0(s, x, 0.5 * x, t)

    times = jnp.asarray([80.0, 20.0, 5.0, 1.0, 0.1, 0.0])
    solver = restart(solvers.BY_NAME[inner](), [(0.9, 30.0, 3, 2), (4.0, 9.0, 2, 1)])
    x = sample(KEY, denoise, schedule=s, shape=(1,), solver=solver, times=times)
    assert np.isfinite(x).all()
    jax.effects_barrier()
    assert len(seen) == solver.count(5)
    plain = solvers.BY_NAME[inner]().count(5)
    assert len(seen) == plain + (2 * 3 + 1 * 2) * (2 if inner == "heun" else 1)
    top = [t for t in seen if abs(t - 30.0) < 1e-3]
    assert len(top) == 2 and sum(abs(t - 9.0) < 1e-3 for t in seen) == 1
    # from the top down to 1 in steps even in sigma^(1/7), Karras' grid
    expected = grids.karras(schedules.edm(1.0, 30.0), 4)[:3]
    start = seen.index(top[0])
    each = 2 if inner == "heun" else 1
    np.testing.assert_allclose(seen[start : start + 3 * each : each], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (lambda: restart(solvers.heun(), []), "restart: intervals is empty"),
        (lambda: restart(solvers.heun(), [(0.5, 0.2, 3, 1)]), r"intervals\[0\] has low=0.5 and hi"),
        (lambda: restart(solvers.heun(), [(0.1, 0.2, 0, 1)]), r"intervals\[0\] has steps=0"),
        (lambda: restart(solvers.ddpm(), [(0.1, 0.3, 2, 1)]), "the solver draws noise"),
        (lambda: restart(solvers.adaptive(), [(0.1, 0.3, 2, 1)]), "a solver with fixed steps"),
        (
            lambda: restart(solvers.heun(), [(0.1, 90.0, 2, 1)]),
            "high=90; high lies above .* most 8",
        ),
        (lambda: restart(solvers.heun(), [(0.1, 0.15, 2, 1)]), "nearest to its low, where .* 0.2,"),
        (
            lambda: restart(solvers.heun(), [(0.1, 0.5, 2, 1), (0.15, 0.6, 2, 1)]),
            "intervals 0 and 1 both start from the grid's t=0.2",
        ),
    ],
)
def test_what_cannot_be_is_refused(solver, said):
    times = [5.0, 1.0, 0.2, 0.0]
    denoise = denoisers.mixture(jnp.asarray([[0.4]]), 0.3, schedules.edm())
    with pytest.raises(ValueError, match=said):
        sample(KEY, denoise, shape=(1,), solver=solver(), times=times)
