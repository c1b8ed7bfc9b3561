"""EDM's table 1: every column again in numpy, and its ODE with Euler or Heun steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from closed_forms import x64

from jdiff import UserError, denoisers, presets, sample, schedules
from jdiff.predictions import parameterization

columns = pytest.mark.parametrize("name", presets.BY_NAME)
M = 1000


def _u():
    """iDDPM's levels u_0 > ... > u_M = 0 (table 1, row "time steps")."""
    abar = np.sin(np.pi / 2 * np.arange(M + 1) / (M * 1.008)) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], 0.001) - 1)
    return u


def _vp_time(sigma):
    """The inverse of sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    return (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9


#: sigma -> (c_skip, c_out, c_in, c_noise)
PRECONDITIONING = {
    "vp": lambda s: (1, -s, 1 / np.sqrt(s**2 + 1), (M - 1) * _vp_time(s)),
    "ve": lambda s: (1, s, 1, np.log(s / 2)),
    "iddpm": lambda s: (
        1, -s, 1 / np.sqrt(s**2 + 1),
        M - 1 - np.argmin(np.abs(_u()[:-1] - s[:, None]), axis=1),
    ),
    "edm": lambda s: (
        0.25 / (s**2 + 0.25), s * 0.5 / np.sqrt(0.25 + s**2), 1 / np.sqrt(s**2 + 0.25),
        np.log(s) / 4,
    ),
}  # fmt: skip


@columns
@x64
def test_the_network_is_preconditioned_as_in_the_table(name):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), with our input s(t) x."""
    preset = presets.BY_NAME[name]()
    F = lambda x, c_noise: np.cos(3.0) * x + 0.7 + c_noise / 500
    apply = lambda params, x, c_noise, cond, key: F(x, c_noise[:, None])
    network = denoisers.network(apply, {}, preset.schedule, preset.parameterization)
    sigma = np.geomspace(0.03, 70, 12)
    x = sigma[:, None] * np.linspace(-2, 2, 36).reshape(12, 3)
    c_skip, c_out, c_in, c_noise = (np.reshape(c, (-1, 1)) for c in PRECONDITIONING[name](sigma))
    t = preset.schedule.time(-2 * jnp.log(sigma))
    ours = network(preset.schedule.alpha(t)[:, None] * x, t).x0
    expected = c_skip * x + c_out * F(c_in * x, c_noise)
    gap = np.abs(ours - expected) / np.maximum(sigma, 0.5)[:, None]  # c_noise is float32
    assert gap.max() < 1e-6


#: The training levels as a variable with a known law, and that law.
TRAINING = {
    "vp": (_vp_time, scipy.stats.uniform(1e-5, 1 - 1e-5)),
    "ve": (np.log, scipy.stats.uniform(np.log(0.02), np.log(100) - np.log(0.02))),
    "iddpm": (lambda s: np.searchsorted(-_u(), -s * (1 + 1e-6)) / M, scipy.stats.uniform()),
    "edm": (np.log, scipy.stats.norm(-1.2, 1.2)),
}


@columns
@x64
def test_the_training_levels_have_the_tables_law(name):
    preset = presets.BY_NAME[name]()
    t = preset.distribution(jax.random.key(3), 4000, preset.schedule)
    variable, law = TRAINING[name]
    sigma = np.asarray(preset.schedule.sigma_ratio(t))
    assert scipy.stats.kstest(variable(sigma), law.cdf).statistic < 1.95 / np.sqrt(4000)  # p = .001
    if name == "iddpm":
        assert np.abs(sigma[:, None] / _u()[:-1] - 1).min(1).max() < 1e-9


@columns
@x64
def test_the_weighting_is_the_tables(name):
    preset = presets.BY_NAME[name]()
    sigma = np.geomspace(0.03, 70, 9)
    weight = preset.weighting(preset.schedule, preset.schedule.time(-2 * jnp.log(sigma)))
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 if name == "edm" else 1 / sigma**2
    np.testing.assert_allclose(weight, expected, rtol=1e-9)


def _steps(name, n):
    """(t_i, sigma_i) of the table, i < N."""
    i = np.arange(n)
    if name == "vp":
        t = 1 + i / (n - 1) * (1e-3 - 1)
        return t, np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    if name == "ve":
        t = 100.0**2 * (0.02**2 / 100.0**2) ** (i / (n - 1))
        return t, np.sqrt(t)
    if name == "iddpm":
        sigma = _u()[np.floor(8 + (M - 1 - 8) / (n - 1) * i + 0.5).astype(int)]
        return sigma, sigma
    t = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return t, t


@pytest.mark.parametrize("n", [2, 18])
@columns
@x64
def test_the_grid_is_the_tables(name, n):
    preset = presets.BY_NAME[name]()
    times = preset.grid(n)
    t, sigma = _steps(name, n)
    np.testing.assert_allclose(preset.schedule.sigma_ratio(times[:-1]), sigma, rtol=1e-8)
    if name != "iddpm":  # there t is sigma in the table, the step in ours
        np.testing.assert_allclose(times[:-1], t, rtol=1e-8)
    assert times[-1] == 0.0


def _table_ode(name, x, denoise, t):
    """Karras et al. 2022, equation 4, with Euler steps, or algorithm 1's (Heun) for EDM."""
    vp_sigma = lambda t: np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    sigma = {"vp": vp_sigma, "ve": np.sqrt}.get(name, lambda t: t)
    s = (lambda t: 1 / np.sqrt(1 + sigma(t) ** 2)) if name == "vp" else (lambda t: 1.0)
    rate = lambda f, t, h=1e-5: (f(t * (1 + h)) - f(t * (1 - h))) / (2 * h * t)

    def slope(x, t):
        D = denoise(x / s(t), sigma(t))
        keep = rate(sigma, t) / sigma(t) + rate(s, t) / s(t)
        return keep * x - rate(sigma, t) * s(t) / sigma(t) * D

    for a, b in zip(t, t[1:]):
        d = slope(x, a)
        ahead = x + (b - a) * d
        x = x + (b - a) * 0.5 * (d + slope(ahead, b)) if name == "edm" else ahead
    return x / s(t[-1])


@columns
@x64
def test_sampling_follows_the_tables_ode_step_by_step(name):
    """Up to the last step before the data, for Gaussian data with its closed-form denoiser."""
    preset, mean, variance = presets.BY_NAME[name](), 0.4, 0.3
    D = lambda x, sigma: (variance * x + sigma**2 * mean) / (variance + sigma**2)
    t, sigma = _steps(name, 6)
    x = sigma[0] * np.asarray([[-1.3], [0.2], [0.9]])
    s = 1 / np.sqrt(1 + sigma[0] ** 2) if name == "vp" else 1.0
    expected = _table_ode(name, s * x, D, t)
    times = preset.grid(6)[:-1]
    exact = denoisers.mixture(jnp.full((1, 1), mean), variance, preset.schedule)
    start = preset.schedule.alpha(times[0]) * jnp.asarray(x)
    end = sample(jax.random.key(0), exact, times=times, solver=preset.solver, x=start)
    ours = np.asarray(end) / float(preset.schedule.alpha(times[-1]))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_nearest_step_needs_a_table():
    with pytest.raises(UserError, match="nearest_step.* needs a discrete table, given EDM"):
        parameterization("eps", "nearest_step").condition_time(schedules.edm(), jnp.ones(2))
