"""One Brownian path a sample: increments that add up, laws of their own, the same on every grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, x64

from jdiff import denoisers, noise, schedules, solvers

KEY = jax.random.key(7)
MANY = 4096


def _keys(n):
    return jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(n))


@jax.jit
def _between(source, keys, x, t, s, step=0):
    return source.at(keys, step).between(x, t, s)


def _snr(schedule, t):
    return np.exp(np.float64(schedule.logsnr(t)))


@pytest.mark.parametrize("name", ["edm", "rectified_flow"])
@x64
def test_increments_of_any_subdivision_add_up_to_the_whole(name):
    s = SCHEDULES[name]()
    source, x = noise.brownian(s), jnp.zeros((3, 2))
    times = at(s, [50.0, 7.0, 6.9, 1.3, 0.2, 0.01])
    snr = _snr(s, times)
    parts = [
        np.sqrt(b - a) * _between(source, _keys(3), x, t, u)
        for a, b, t, u in zip(snr, snr[1:], times, times[1:])
    ]
    whole = np.sqrt(snr[-1] - snr[0]) * _between(source, _keys(3), x, times[0], times[-1])
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-9)


def test_increments_are_standard_normal_and_independent_over_intervals_samples_and_leaves():
    s = schedules.edm()
    source, keys = noise.brownian(s), _keys(MANY)
    x = {"a": jnp.zeros((MANY, 2)), "b": jnp.zeros((MANY,))}
    times = at(s, [40.0, 3.0, 2.9, 0.5, 0.4])
    to_the_data, from_pure_noise = (times[2], 0.0 * times[2]), (jnp.inf * times[0], times[0])
    pairs = [*zip(times, times[1:]), to_the_data, from_pure_noise]
    found = [_between(source, keys, x, t, u) for t, u in pairs]
    columns = np.stack([c for z in found[:4] for c in (*np.asarray(z["a"]).T, np.asarray(z["b"]))])
    ends = np.stack([np.asarray(z["b"]) for z in found[4:]])
    error = 5 / np.sqrt(MANY)
    np.testing.assert_allclose(np.corrcoef(columns), np.eye(len(columns)), atol=error)
    for row in (*columns, *ends):
        assert abs(row.mean()) < error
        assert abs(row.std() - 1) < error
        assert abs((row**4).mean() - 3) < 10 * error


def test_a_path_depends_on_its_samples_key_alone():
    s = schedules.edm()
    source, t, u = noise.brownian(s), jnp.asarray(3.0), jnp.asarray(1.0)
    all_of_them = _between(source, _keys(8), jnp.zeros((8, 2)), t, u)
    some = _between(source, _keys(8)[2:4], jnp.zeros((2, 2)), t, u)
    np.testing.assert_allclose(some, all_of_them[2:4], rtol=1e-5)
    later = _between(source, _keys(8), jnp.zeros((8, 2)), t, u, 5)
    np.testing.assert_array_equal(later, all_of_them)


def test_nothing_lies_between_a_time_and_itself_and_free_noise_is_drawn_anew():
    s, x, t = schedules.edm(), jnp.zeros((8, 2)), jnp.asarray(0.3)
    np.testing.assert_array_equal(_between(noise.brownian(s), _keys(8), x, t, t), x)
    draws = [
        np.asarray(noise.brownian(s).at(_keys(8), step).free(x, i))
        for step, i in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(np.unique(draws)) == 48
    np.testing.assert_array_equal(draws[1], noise.fresh().at(_keys(8), 0).free(x, 1))


SAMPLES, FINE = 64, 512


@jax.jit
def _march(solver, denoise, schedule, source, times, n):
    """n of the grid's steps, n traced, from x / alpha normal with the deviation sigma / alpha."""
    keys = _keys(SAMPLES)
    start = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 99), (1,)))(keys)

    def step(i, carry):
        x, memory = carry
        now = source.at(keys, i)
        return solver.step(denoise, schedule, x, memory, times[i], times[i + 1], now, {})[:2]

    x = schedule.sigma(times[0]) * start
    x = jax.lax.fori_loop(0, n, step, (x, solver.init(x, times)))[0]
    return x / schedule.alpha(times[n])


def _ends(solver, schedule, source, sigmas, variance):
    """x / alpha at the end, of data that are three Gaussians, or one point where variance = 0."""
    means = jnp.asarray([-1.0, 0.3, 1.2] if variance else [0.3, 0.3, 0.3])[:, None]
    denoise = denoisers.mixture(means, jnp.full(3, variance), schedule)
    times = jnp.pad(at(schedule, sigmas), (0, FINE + 1 - len(sigmas)))
    return np.asarray(_march(solver, denoise, schedule, source, times, len(sigmas) - 1))


@x64
def test_a_posterior_sampler_that_is_told_one_image_draws_one_sample_on_every_grid_and_schedule():
    """Chapman-Kolmogorov along the path: eta = 1 and a constant x0."""
    grids = [np.asarray([4.0, 0.1]), np.asarray([4.0, 1.7, 0.9, 0.1]), np.geomspace(4.0, 0.1, 30)]
    edm, flow = schedules.edm(), schedules.rectified_flow()
    cases = [(edm, grid) for grid in grids] + [(flow, grids[1])]
    ends = [_ends(solvers.ddpm(), s, noise.brownian(s), grid, 0.0) for s, grid in cases]
    for other in ends[1:]:
        np.testing.assert_allclose(other, ends[0], rtol=1e-8, atol=1e-8)
    assert ends[0].std() == pytest.approx(0.1, rel=0.3)  # a draw of N(0.3, 0.1^2)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_sde", "dpmpp_2m_sde"])
@x64
def test_samples_converge_path_by_path_with_strong_order_1_and_do_not_without_the_path(name):
    s, solver = schedules.edm(), solvers.BY_NAME[name]()

    def errors(source):
        ends = [
            _ends(solver, s, source, np.geomspace(4.0, 0.4, n + 1), 0.1) for n in (16, 128, FINE)
        ]
        return [np.sqrt(np.mean((end - ends[-1]) ** 2)) for end in ends[:-1]]

    coarse, fine = errors(noise.brownian(s))
    order = np.log(coarse / fine) / np.log(8.0)
    print(f"{name}: strong order {order:.2f}, error {fine:.1e} at 128 steps")
    assert order == pytest.approx(1.0, abs=0.25)
    if name == "ddpm":
        coarse, fine = errors(noise.fresh())
        assert fine > 0.8 * coarse


def test_a_clock_is_a_schedule_and_a_depth():
    with pytest.raises(ValueError, match="brownian: schedule"):
        noise.brownian({"a": 3})
    with pytest.raises(ValueError, match="depth=30 given; allowed are 1 to 29"):
        noise.brownian(schedules.edm(), depth=30)
