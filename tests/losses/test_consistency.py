"""Consistency models: levels, curriculum, distances as published; exact functions lose nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64
from exact_flow import denoiser, network, to

from jdiff import losses, schedules, solvers
from jdiff.errors import UserError
from jdiff.losses import distances
from jdiff.losses.consistency import curriculum, interval, level
from jdiff.predictions import parameterization

KEY = jax.random.key(0)
EDM = schedules.edm()


def karras(n):
    """Equation 5 of Karras et al. 2022, from the lowest: n + 1 levels."""
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return (low + np.arange(n + 1) / n * (high - low)) ** 7


@x64
def test_the_levels_are_those_of_karras():
    for n in (1, 17):
        np.testing.assert_allclose(level(EDM, 1 + jnp.arange(n + 1), n), karras(n), rtol=1e-9)


def test_the_levels_double_at_equal_distances_and_end_at_the_most():
    """K = 400,000, s_0 = 10, s_1 = 1280: eight stages of 50,000 steps (iCT, table 1)."""
    steps = jnp.array([0, 49_999, 50_000, 199_999, 200_000, 399_999, 500_000])
    expected = [10, 10, 20, 80, 160, 1280, 1280]
    np.testing.assert_array_equal(curriculum(steps, 400_000, 10, 1280), expected)
    np.testing.assert_array_equal(curriculum(steps, 400_000, 18, 18), 18)  # no curriculum
    assert curriculum(jnp.asarray(3), 4, 10, 1280) <= 1280  # fewer steps than stages


def test_the_row_is_the_published_preconditioning_and_holds_the_boundary():
    """c_skip, c_out and c_in of Song et al. 2023, appendix C: f(x, t_min) = x for any network."""
    row, sd, low = parameterization("consistency", sigma_data=0.5), 0.5, 0.002
    sigma = jnp.asarray([low, 0.003, 0.5, 80.0])
    x, f = jax.random.normal(KEY, (2, 4, 3))
    skip = sd**2 / ((sigma - low) ** 2 + sd**2)
    out = sd * (sigma - low) / jnp.sqrt(sigma**2 + sd**2)
    found = row.prediction(EDM, f, x, sigma)
    expected = skip[:, None] * x + out[:, None] * f
    np.testing.assert_allclose(found.x0, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.x0 + sigma[:, None] * found.eps, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.x0[0], x[0], rtol=1e-6)
    scaled = row.scale_input(EDM, x, sigma)
    np.testing.assert_allclose(scaled, x / jnp.sqrt(sigma**2 + sd**2)[:, None], rtol=1e-6)
    assert row.time == "log_sigma"
    slope = jax.grad(lambda f: row.prediction(EDM, f, x, sigma).x0.sum())(f)
    np.testing.assert_allclose(slope, jnp.broadcast_to(out[:, None], f.shape), 1e-4, 1e-12)
    # another path: the same function of x / alpha and sigma / alpha
    s = schedules.cosine()
    t = s.time(jnp.asarray([20.0, 3.0, 0.0, -3.0]))
    alpha, k = s.alpha(t), s.sigma_ratio(t)
    other = parameterization("consistency").prediction(
        schedules.edm(float(s.sigma_ratio(s.t_min)), 80.0), f, x / alpha[:, None], k
    )
    np.testing.assert_allclose(row.prediction(s, f, x, t).x0, other.x0, rtol=1e-4, atol=1e-5)


def test_intervals_are_as_likely_as_a_normal_log_sigma_falls_in_them():
    """iCT, table 1, over all intervals; without a mean, evenly."""
    n, draws = 20, 200_000
    phi = lambda sigma: 0.5 * (1 + math.erf((math.log(sigma) + 1.1) / (math.sqrt(2) * 2.0)))
    weights = np.diff([phi(sigma) for sigma in karras(n)])
    draw = jax.jit(interval, static_argnums=(1, 4))
    for mean, share in ((-1.1, weights / weights.sum()), (None, np.full(n, 1 / n))):
        i = np.asarray(draw(KEY, draws, EDM, n, mean, 2.0))
        assert (i.min(), i.max()) == (1, n)
        found = np.bincount(i, minlength=n + 1)[1:]
        chi2 = np.sum((found - draws * share) ** 2 / (draws * share))
        assert chi2 < 19 + 4 * math.sqrt(2 * 19)


def test_pseudo_huber_keeps_its_digits():
    """sqrt(||a - b||^2 + c^2) - c with c = scale sqrt(d), in numpy float64."""
    a = np.array([[0.0, 0.0], [1e-6, 0.0], [3.0, 4.0]], np.float32)
    square = np.sum(a.astype(np.float64) ** 2, 1)
    c = 0.1 * np.sqrt(2)
    expected = [0.0, square[1] / (2 * c), np.sqrt(25 + c**2) - c]
    found = distances.pseudo_huber(a, jnp.zeros((3, 2)), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    slope = jax.grad(lambda a: distances.pseudo_huber(a, 0 * a, 0.1).sum())(jnp.zeros((1, 2)))
    np.testing.assert_array_equal(slope, 0.0)


@x64
def test_neighbours_share_their_noise():
    """For f(x, t) = x and the two levels 0.002 and 80, f differs by (80 - 0.002) eps."""
    x0, eps = jax.random.normal(KEY, (2, 16, 3))
    same = network(lambda p, x, t, cond: x, EDM)
    gap = 80.0 - 0.002

    @jax.jit
    def loss(huber=None):
        return losses.consistency(
            KEY, same, x0, target=same, step=jnp.asarray(0), total=1, fewest=1, most=1,
            huber=huber, eps=eps,
        )  # fmt: skip

    np.testing.assert_allclose(loss(), gap * jnp.mean(eps**2, 1), rtol=1e-6)  # weight 1 / gap
    c = 0.5 * 3**0.5
    length = jnp.sqrt(gap**2 * jnp.sum(eps**2, 1) + c**2) - c
    np.testing.assert_allclose(loss(0.5), length / gap, rtol=1e-6)


@x64
def test_of_a_point_the_consistency_function_is_the_point_and_a_collapse_is_not_a_solution():
    """Data at m: f = m has no loss in any interval but the lowest, where f(x, t_min) = x."""
    m = 0.3
    answer = lambda b: network(lambda p, x, t, cond: p["b"] + 0 * x, EDM, "x0", {"b": b})
    loss = jax.jit(lambda b, n: losses.consistency(
        KEY, answer(b), jnp.full((4096, 1), m), target=answer(b), step=jnp.asarray(0), total=1,
        fewest=n, most=n, mean=None, huber=None,
    ), static_argnums=1)  # fmt: skip
    found = loss(m, 8)
    assert jnp.median(found) == 0.0
    at_the_lowest = (5 * 0.002) ** 2 / (karras(8)[1] - karras(8)[0])  # 5 deviations of its noise
    assert 0.0 < found.max() < at_the_lowest
    assert loss(m + 0.5, 8).mean() > 100 * found.mean()


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
@x64
def test_distilling_an_exact_teacher_loses_the_error_of_one_step_of_its_solver(solver, order):
    """For the exact f, the point of the trajectory at t_min, the rest is O(h^(order + 1))."""
    s = schedules.edm(0.1, 5.0)
    lowest = lambda x: jnp.full(len(x), 0.1)
    exact = network(lambda p, x, t, cond: to(s, x, t, lowest(x)), s)
    x0 = 0.7 + 0.3 * jax.random.normal(KEY, (2048, 1))
    errors = []
    for levels in (33, 65):
        loss = lambda levels=levels: losses.consistency_distillation(
            KEY, exact, x0, teacher=denoiser(s), target=exact, solver=solvers.BY_NAME[solver](),
            levels=levels, huber=None,
        )  # fmt: skip
        errors.append(float(jnp.sqrt(jax.jit(loss)().mean())))
    assert errors[1] < 0.01
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order + 1, atol=0.3)


def test_no_gradient_flows_into_the_target():
    answer = lambda b: network(lambda p, x, t, cond: p["b"] * x, EDM, "x0", {"b": b})
    x0 = jax.random.normal(KEY, (8, 1))
    loss = lambda b: losses.consistency(
        KEY, answer(0.5), x0, target=answer(b), step=jnp.asarray(0), total=8
    ).sum()  # fmt: skip
    assert jax.jit(jax.grad(loss))(0.3) == 0.0


def test_what_cannot_be_is_refused():
    flow = schedules.rectified_flow()
    answer = network(lambda p, x, t, cond: x, flow)
    given = dict(target=answer, x0=jnp.zeros((2, 1)), denoiser=answer)
    with pytest.raises(UserError, match="RectifiedFlow is infinite at its t_max"):
        losses.consistency(KEY, step=0, total=9, **given)
    with pytest.raises(UserError, match="fewest=9 and most=3"):
        losses.consistency(KEY, step=0, total=9, fewest=9, most=3, **given)
    with pytest.raises(UserError, match="levels=1"):
        losses.consistency_distillation(KEY, teacher=None, levels=1, **given)
