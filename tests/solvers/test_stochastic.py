"""Stochastic steps on Gaussian data, where every step is linear: gain and noise in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import at, same, x64

from jdiff import denoisers, sample, schedules, solvers
from jdiff.noise import Fresh
from jdiff.predictions import Prediction

KEY = jax.random.key(5)
SCHEDULES = {"vp": schedules.vp_linear, "edm": schedules.edm, "flow": schedules.rectified_flow}
every = pytest.mark.parametrize("name", SCHEDULES)
MANY = 20_000


@jax.jit
def _affine(solver, denoise, schedule, t, s, steps=10.0):
    """A step as x_s = gain x_t + noise: (gain twice, standard deviation and mean of the noise).

    Gain from three points under one key, the noise over many keys at x_t = 0.
    """
    memory = solver.init(jnp.zeros((1, 1)), jnp.zeros(2))
    memory = jnp.float32(steps) if isinstance(solver, type(solvers.edm())) else memory

    def step(x, keys):
        return solver.step(denoise, schedule, x, memory, t, s, Fresh(keys), {})[0]

    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(MANY))
    probe = step(jnp.asarray([[0.0], [1.0], [2.0]]), jnp.stack([keys[0]] * 3))[:, 0]
    noise = step(jnp.zeros((MANY, 1)), keys)[:, 0]
    return probe[1] - probe[0], probe[2] - probe[1], noise.std(), noise.mean()


def _gaussian(schedule, mean, variance):
    return denoisers.mixture(jnp.asarray([[mean]], jnp.result_type(float)), variance, schedule)


def _levels(schedule, t):
    return tuple(float(f(t)) for f in (schedule.alpha, schedule.sigma))


def _posterior_std(schedule, t, s):
    """sqrt of Ho et al.'s (7), from the variances alone: 1 / (1 / v_s + a^2 / v_ts)."""
    (a_t, b_t), (a_s, b_s) = _levels(schedule, t), _levels(schedule, s)
    a = a_t / a_s
    step = b_t**2 - a**2 * b_s**2  # of q(x_t | x_s)
    return np.sqrt(b_s**2 * step / (b_s**2 * a**2 + step)), np.sqrt(step)


CLOSE = dict(rtol=4 / np.sqrt(2 * MANY))  # four standard errors of a standard deviation


@every
@pytest.mark.parametrize(
    ("solver", "share"),
    [
        (solvers.ddpm(), 1.0),
        (solvers.ddim(1.0), 1.0),
        (solvers.ddim(0.3), 0.3),
        (solvers.ddim(), 0),
    ],
    ids=["ddpm", "ddim1", "ddim0.3", "ddim0"],
)
@x64
def test_around_one_data_point_any_two_times_have_exact_marginals(name, solver, share):
    """gain^2 sigma_t^2 + std^2 = sigma_s^2: Chapman-Kolmogorov, at any step length and eta."""
    s = SCHEDULES[name]()
    t, u = at(s, [3.0, 0.4])
    (a_t, b_t), (a_u, b_u) = _levels(s, t), _levels(s, u)
    gain, again, std, mean = map(float, _affine(solver, _gaussian(s, 0.7, 0.0), s, t, u))
    expected = share * _posterior_std(s, t, u)[0]
    np.testing.assert_allclose(std, expected, **CLOSE, atol=1e-12)
    np.testing.assert_allclose([gain, again], np.sqrt(b_u**2 - expected**2) / b_t, rtol=1e-8)
    # and the mean goes from alpha_t m to alpha_u m
    error = 4 * expected / np.sqrt(MANY)
    np.testing.assert_allclose(gain * a_t * 0.7 + mean, a_u * 0.7, atol=error + 1e-9)


@x64
def test_ddpm_with_the_large_variance_is_exact_for_unit_gaussian_data():
    """beta is the reverse variance when the data are N(0, I) and the path keeps the variance."""
    s = schedules.vp_linear()
    t, u = at(s, [2.0, 0.5])
    gain, again, std, _ = map(float, _affine(solvers.ddpm(1.0), _gaussian(s, 0.0, 1.0), s, t, u))
    np.testing.assert_allclose([gain, again], float(s.alpha(t) / s.alpha(u)), rtol=1e-9)
    np.testing.assert_allclose(gain**2 + std**2, 1.0, rtol=0.02)
    np.testing.assert_allclose(std, _posterior_std(s, t, u)[1], **CLOSE)


@x64
def test_ddpms_variance_interpolates_the_logarithms_of_its_bounds():
    s = schedules.vp_linear()
    t, u = at(s, [2.0, 0.5])
    small, large = _posterior_std(s, t, u)
    std = float(_affine(solvers.ddpm(0.25), _gaussian(s, 0.0, 1.0), s, t, u)[2])
    np.testing.assert_allclose(std, small**0.75 * large**0.25, **CLOSE)


@x64
def test_a_learned_variance_takes_the_place_of_ddpms_own_entry_by_entry():
    s, x = schedules.vp_linear(), jnp.asarray([[0.3, -1.0]] * 2)
    t, u = at(s, [2.0, 0.5])
    share = jnp.asarray([[0.0, 0.25], [1.0, 0.25]])
    keys = jax.random.split(KEY, 2)

    def ends(solver, variance):
        denoise = lambda x, t, cond: Prediction(0.5 * x, x, variance)
        return solver.step(denoise, s, x, (), t, u, Fresh(keys), {})[0]

    learned = ends(solvers.ddpm(0.7), share)
    for fixed in (0.0, 0.25, 1.0):
        entries = np.asarray(share == fixed)
        np.testing.assert_array_equal(
            np.asarray(learned)[entries], np.asarray(ends(solvers.ddpm(fixed), None))[entries]
        )


@x64
def test_ancestral_sampling_from_2_to_1_goes_down_to_one_half():
    """k-diffusion's sigma_down = 0.5 and sigma_up = 0.8660254, of which the squares add to 1."""
    s = schedules.edm()
    t, u = jnp.asarray(2.0), jnp.asarray(1.0)
    gain, _, std, _ = map(float, _affine(solvers.ddpm(), _gaussian(s, 0.0, 0.0), s, t, u))
    np.testing.assert_allclose(gain, 0.5 / 2.0, rtol=1e-9)
    np.testing.assert_allclose(std, 0.8660254, **CLOSE)


@every
def test_ddim_with_eta_1_is_ddpm_on_the_same_noise(name):
    s = SCHEDULES[name]()
    denoise = denoisers.mixture(jnp.asarray([[-1.0], [0.6]]), 0.1, s)
    times = jnp.append(at(s, [5.0, 2.0, 0.7, 0.1]), 0.0)
    one, other = (
        sample(KEY, denoise, shape=(1,), num=64, times=times, solver=v)
        for v in (solvers.ddim(1.0), solvers.ddpm())
    )
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


CHURN = {  # (churn, s_min, s_max, noise) at sigma / alpha = 2 and 10 steps -> gamma
    "shared_out": ((3.0, 0.0, np.inf, 1.0), 0.3),
    "capped": ((40.0, 0.0, np.inf, 1.0), np.sqrt(2) - 1),
    "above_the_range": ((3.0, 0.0, 1.9, 1.0), 0.0),
    "below_the_range": ((3.0, 2.1, np.inf, 1.0), 0.0),
    "scaled_noise": ((3.0, 0.0, np.inf, 1.2), 0.3),
}


@pytest.mark.parametrize("case", CHURN)
@every
@x64
def test_churn_raises_the_noise_by_gamma_capped_in_its_range_and_scaled(name, case):
    """A step to the data from sigma_hat = (1 + gamma) sigma returns x0_hat: its noise is known."""
    numbers, gamma = CHURN[case]
    s, v = SCHEDULES[name](), 0.5
    t = at(s, 2.0)
    _, _, std, _ = map(float, _affine(solvers.edm(*numbers), _gaussian(s, 0.0, v), s, t, 0.0 * t))
    hat = 2.0 * (1 + gamma)
    gain = v / (v + hat**2)  # of x0 on x / alpha
    added = numbers[3] * np.sqrt(hat**2 - 2.0**2)
    np.testing.assert_allclose(std, gain * added, **CLOSE, atol=1e-12)


@every
@x64
def test_without_churn_edm_is_heun_and_deaf_to_its_key(name):
    s = SCHEDULES[name]()
    t, u = at(s, [3.0, 1.0])
    one = _affine(solvers.edm(), _gaussian(s, 0.5, 0.3), s, t, u)
    other = _affine(solvers.heun(), _gaussian(s, 0.5, 0.3), s, t, u)
    same(one, other, 1e-9, 1e-12)
    assert one[2] < 1e-12


@pytest.mark.parametrize("name", ["vp", "flow"])
@x64
def test_edms_sampler_on_any_schedule_is_edms_own_under_x_over_alpha(name):
    """Without churn; Heun's two stages differ only in the variable they are straight in."""
    ends, sigmas = [], np.geomspace(6.0, 0.05, 400)
    for s in (schedules.edm(), SCHEDULES[name]()):
        times = jnp.append(at(s, sigmas), 0.0)
        x = jnp.asarray([[4.0], [-7.0]]) * s.alpha(times[0])
        ends.append(sample(KEY, _gaussian(s, 0.2, 0.3), x=x, times=times, solver=solvers.edm()))
    np.testing.assert_allclose(ends[1], ends[0], atol=2e-4)


SAMPLERS = {
    "ddpm": solvers.ddpm(), "ddpm_large": solvers.ddpm(1.0), "ddim": solvers.ddim(),
    "ddim_half": solvers.ddim(0.5), "edm": solvers.edm(churn=10.0), "2m": solvers.dpmpp_2m(),
}  # fmt: skip


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_many_steps_end_in_the_gaussian_of_the_data(name, solver):
    """N(0.4, 0.3) within four standard errors and the solver's own error at 200 steps."""
    s, num = SCHEDULES[name](), 8192
    times = jnp.append(at(s, np.geomspace(60.0, 0.01, 200)), 0.0)
    x = sample(
        KEY, _gaussian(s, 0.4, 0.3), shape=(1,), num=num, times=times, solver=SAMPLERS[solver]
    )
    mean, std = float(x.mean()), float(x.std())
    assert mean == pytest.approx(0.4, abs=4 * np.sqrt(0.3 / num) + 0.005)
    assert std == pytest.approx(np.sqrt(0.3), rel=4 / np.sqrt(2 * num) + 0.025)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: solvers.ddim(1.5), r"ddim: eta=1.5 given; it lies in \[0, 1\]"),
        (lambda: solvers.ddpm(-0.1), r"ddpm: variance=-0.1 given; it lies in \[0, 1\]"),
        (lambda: solvers.edm(churn=-1.0), r"edm: churn=-1.0 given; it must not be negative"),
    ],
)
def test_a_solvers_number_out_of_range_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
