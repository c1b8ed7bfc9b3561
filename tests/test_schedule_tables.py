"""Tables of noise levels, and schedules made from schedules: terminal noise and shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import ALL_SCHEDULES, inside, x64

from jdiff import schedules


def _table_of(name):
    """alphas_cumprod in numpy float64, from the betas of the paper or of its code."""
    if name == "squared_cosine":
        f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f(np.arange(1, 1001) / 1000) / f(np.arange(1000) / 1000), 0.999)
    elif name == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    else:
        betas = np.linspace(1e-4, 0.02, 1000)
    return np.cumprod(1 - betas)


TABLES = ["ddpm_linear", "scaled_linear", "squared_cosine"]


@pytest.mark.parametrize("name", TABLES)
@x64
def test_a_table_is_the_float64_cumulative_product_at_integers(name):
    s, abar, t = ALL_SCHEDULES[name](), _table_of(name), np.arange(1, 1001)
    np.testing.assert_allclose(s.alpha(t) ** 2, abar, rtol=1e-9)
    np.testing.assert_allclose(s.sigma(t) ** 2, 1 - abar, rtol=1e-9)
    assert s.T == s.t_max == 1000


@x64
def test_the_tables_have_their_published_ends():
    s = schedules.ddpm_linear()
    np.testing.assert_allclose(s.alpha(1000) ** 2, 4.035830e-5, rtol=2e-7)
    np.testing.assert_allclose(s.sigma_ratio(1000), 157.4073, rtol=5e-7)
    np.testing.assert_allclose(s.sigma_ratio(1), (1e-4 / (1 - 1e-4)) ** 0.5, rtol=1e-10)
    s = schedules.scaled_linear()
    np.testing.assert_allclose(s.alpha(1000), 0.068265, rtol=1e-5)
    np.testing.assert_allclose(s.sigma_ratio(jnp.asarray([1, 1000])), [0.029167, 14.6146], 2e-5)
    s = schedules.squared_cosine()
    np.testing.assert_allclose(s.sigma(1) ** 2, 4.128422e-5, rtol=1e-6)
    np.testing.assert_allclose(s.alpha(jnp.asarray([501, 1000])) ** 2, [0.492285, 2.429e-9], 5e-4)


@x64
def test_ncsns_ladder_is_the_papers_geometric_sequence():
    """Song and Ermon 2019: ten levels from 1 to 0.01; ours rise with t."""
    s = schedules.ncsn()
    np.testing.assert_allclose(s.sigma(np.arange(10, 0, -1)), np.geomspace(1, 0.01, 10), rtol=1e-12)
    middle = s.sigma(jnp.asarray([3.0, 3.5, 4.0]))
    np.testing.assert_allclose(middle[1] ** 2, middle[0] * middle[2], rtol=1e-12)
    assert s.T == 10


@x64
def test_between_its_steps_a_table_is_continuous_and_linear_in_logsnr():
    s = schedules.ddpm_linear(T=10)
    steps = jnp.arange(1.0, 11.0)
    np.testing.assert_allclose(s.logsnr(steps - 1e-9)[1:], s.logsnr(steps)[1:], atol=1e-7)
    middle = 0.5 * (s.logsnr(steps[:-1]) + s.logsnr(steps[1:]))
    np.testing.assert_allclose(s.logsnr(steps[:-1] + 0.5), middle, rtol=1e-12)
    # below the first step sigma / alpha falls linearly to the data
    np.testing.assert_allclose(s.sigma_ratio(0.25), 0.25 * s.sigma_ratio(1.0), rtol=1e-12)
    np.testing.assert_allclose(s.time(s.logsnr(0.25)), 0.25, rtol=1e-12)


# Zero terminal SNR.


@pytest.mark.parametrize("name", TABLES)
@x64
def test_a_rescaled_table_is_algorithm_1_of_lin_et_al(name):
    s = schedules.zero_terminal_snr(ALL_SCHEDULES[name]())
    root = np.sqrt(_table_of(name))
    first, last = root[0], root[-1]
    expected = (root - last) * first / (first - last)
    t = np.arange(1, 1001)
    np.testing.assert_allclose(s.alpha(t), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(s.sigma(t), np.sqrt(1 - expected**2), rtol=1e-9)
    assert s.T == 1000


@pytest.mark.parametrize("name", TABLES + ["vp_linear", "cosine"])
def test_a_rescaled_schedule_ends_in_pure_noise_and_nowhere_in_nan(name):
    base = ALL_SCHEDULES[name]()
    s = schedules.zero_terminal_snr(base)
    top = jnp.asarray(s.t_max)
    assert float(s.alpha(top)) == 0.0
    assert float(s.sigma(top)) == 1.0
    assert float(s.logsnr(top)) == -np.inf
    assert float(s.time(-jnp.inf)) == float(top)
    assert float(s.alpha(s.t_min)) == pytest.approx(float(base.alpha(base.t_min)), rel=1e-6)
    t = jnp.linspace(s.t_min, s.t_max, 1001, dtype=jnp.float32)
    with jax.enable_x64(False):
        values = jax.jit(lambda s, t: (
            s.alpha(t), s.sigma(t), s.logsnr(t), s.time(s.logsnr(t)), s.rates(t), s.drift(t),
            s.diffusion(t)))(s, t)  # fmt: skip
    assert not any(np.isnan(v).any() for v in jax.tree.leaves(values))
    assert (np.asarray(values[0][:-1]) > 0).all()
    assert float(values[0][-1]) == 0.0


@x64
def test_a_rescaled_continuous_schedule_is_the_same_map_of_alpha():
    s, t = schedules.zero_terminal_snr(schedules.vp_linear()), np.linspace(1e-3, 1, 11)
    root = lambda t: np.exp(-0.5 * (0.1 * t + 0.5 * 19.9 * t**2))
    expected = (root(t) - root(1)) * root(1e-3) / (root(1e-3) - root(1))
    np.testing.assert_allclose(s.alpha(t), expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(s.alpha(5e-4), root(5e-4), rtol=1e-12)  # below t_min: the base


# Shifts.


@pytest.mark.parametrize("shift", [64 / 256, 3.0])
@pytest.mark.parametrize("name", ["edm", "ve", "vp_linear", "sub_vp", "ddpm_linear", "polynomial"])
@x64
def test_a_shift_adds_twice_its_logarithm_and_keeps_the_path(name, shift):
    """shift = 64 / d: less SNR at a higher resolution (Hoogeboom et al. 2023)."""
    base = ALL_SCHEDULES[name]()
    s, t = schedules.shifted(base, shift), inside(base)
    np.testing.assert_allclose(s.logsnr(t), base.logsnr(t) + 2 * np.log(shift), 1e-9, 1e-9)
    if base.T is None:  # the same (alpha, sigma) pairs, met at other times
        u = base.time(s.logsnr(t))
        np.testing.assert_allclose([s.alpha(t), s.sigma(t)], [base.alpha(u), base.sigma(u)], 1e-9)
    assert (s.T, s.t_data) == (base.T, base.t_data)


@x64
def test_the_shifted_cosine_is_the_cosine_with_its_own_shift():
    t = jnp.linspace(0.05, 0.95, 9)
    own, wrapped = schedules.cosine(shift=0.25), schedules.shifted(schedules.cosine(), 0.25)
    for what in ("alpha", "sigma", "logsnr", "diffusion"):
        a, b = (getattr(s, what)(t) for s in (own, wrapped))
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=what)


@x64
def test_shifts_of_a_shift_multiply():
    s = schedules.rectified_flow()
    twice, once = schedules.shifted(schedules.shifted(s, 0.5), 0.4), schedules.shifted(s, 0.2)
    t = jnp.linspace(0, 1, 9)
    np.testing.assert_allclose(twice.sigma(t), once.sigma(t), rtol=1e-12)


@x64
def test_the_time_shift_of_sd3_and_flux():
    assert float(schedules.shift_time(0.5, 3.0)) == pytest.approx(0.75)
    np.testing.assert_array_equal(schedules.shift_time(jnp.asarray([0.0, 1.0]), 3.0), [0, 1])
    t, flow = jnp.linspace(0.1, 0.9, 5), schedules.rectified_flow()
    gap = flow.logsnr(schedules.shift_time(t, 3.0)) - flow.logsnr(t)
    np.testing.assert_allclose(gap, -2 * np.log(3.0), rtol=1e-12)
    mus = [np.log(schedules.flux_shift(n)) for n in (256, 1024, 4096)]
    np.testing.assert_allclose(mus, [0.5, 0.63, 1.15], rtol=1e-12)


@pytest.mark.parametrize("name", [*TABLES, "ncsn", "shifted_table", "zero_terminal_scaled_linear"])
@x64
def test_the_velocity_at_a_tables_end_is_that_of_its_last_interval(name):
    """All of it, by differences from the left: solvers in t take their first step by it."""
    s, h = ALL_SCHEDULES[name](), 1e-4
    end = jnp.asarray(s.t_max)
    for rate, f in zip(s.rates(end), (s.alpha, s.sigma)):
        expected = (3.0 * f(end) - 4.0 * f(end - h) + f(end - 2.0 * h)) / (2.0 * h)
        np.testing.assert_allclose(rate, expected, rtol=1e-3, atol=1e-11)
