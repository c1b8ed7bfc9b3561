"""Noise schedules: the path x_t = alpha x0 + sigma eps, its logSNR and its SDE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, VARIANCE_PRESERVING, ends, inside, x64

from jdiff import UserError, schedules

every = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def _differences(f, t, h):
    """d f / dt by the five-point rule."""
    return (f(t - 2 * h) - 8 * f(t - h) + 8 * f(t + h) - f(t + 2 * h)) / (12 * h)


@every
def test_the_data_is_alpha_one_and_sigma_zero_exactly(make):
    s = make()
    assert float(s.alpha(s.t_data)) == 1.0
    assert float(s.sigma(s.t_data)) == 0.0


@every
def test_the_domain_lies_above_the_data(make):
    s = make()
    assert s.t_data <= s.t_min < s.t_max


@every
@x64
def test_logsnr_is_twice_log_alpha_over_sigma(make):
    s = make()
    t = inside(s, 33)
    expected = 2 * np.log(np.asarray(s.alpha(t)) / np.asarray(s.sigma(t)))
    np.testing.assert_allclose(s.logsnr(t), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(s.sigma_ratio(t), s.sigma(t) / s.alpha(t), rtol=1e-9)


@every
def test_logsnr_falls_strictly_with_t(make):
    s = make()
    low, high = ends(s)
    t = np.linspace(low, high, 4001)
    assert (np.diff(np.asarray(s.logsnr(jnp.asarray(t, jnp.float32)))) < 0).all()


@every
@x64
def test_time_inverts_logsnr_in_float64(make):
    s = make()
    t = jnp.linspace(*ends(s), 101)
    np.testing.assert_allclose(s.time(s.logsnr(t)), t, rtol=1e-9)


@every
def test_time_inverts_logsnr_to_the_accuracy_of_float32(make):
    """One rounding of logsnr moves t by eps |logsnr| / |d logsnr / dt|: a few of these at most."""
    s = make()
    low, high = ends(s)
    t = jnp.concatenate([jnp.linspace(low, high, 101), inside(s, 101)])
    with jax.enable_x64(True):
        slope = np.asarray(jax.vmap(jax.grad(make().logsnr))(jnp.asarray(np.asarray(t, float))))
    one_rounding = 6e-8 * (np.abs(t) + (1 + np.abs(s.logsnr(t))) / np.abs(slope))
    assert (np.abs(np.asarray(s.time(s.logsnr(t))) - t) < 6 * one_rounding).all()


@every
def test_float32_keeps_its_digits_up_to_both_ends(make):
    """At the same t, float32 agrees with float64: alpha and sigma to relative 1e-6."""
    s = make()
    low, high = ends(s)
    t = np.concatenate([[low, high], np.asarray(inside(s, 51))]).astype(np.float32)
    t = np.clip(t, low, high).astype(np.float32)
    alpha, sigma, logsnr = (np.asarray(f(jnp.asarray(t))) for f in (s.alpha, s.sigma, s.logsnr))
    with jax.enable_x64(True):
        s, t = make(), jnp.asarray(t.astype(float))
        np.testing.assert_allclose(sigma, s.sigma(t), rtol=3e-6)
        np.testing.assert_allclose(alpha, s.alpha(t), rtol=3e-6)
        np.testing.assert_allclose(logsnr, s.logsnr(t), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("sigma", [1e-3, 2e-3, 0.01])
@pytest.mark.parametrize("name", ["edm", "vp_linear", "cosine", "rectified_flow"])
def test_small_noise_levels_are_reached_and_left_without_loss(name, sigma):
    s = SCHEDULES[name]()
    t = s.time(jnp.float32(-2 * np.log(sigma)))
    np.testing.assert_allclose(s.sigma_ratio(t), sigma, rtol=3e-6)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING + ["cosine_shifted"])
@x64
def test_variance_preserving_paths_keep_the_variance(name):
    s = SCHEDULES[name]()
    t = inside(s, 33)
    np.testing.assert_allclose(s.alpha(t) ** 2 + s.sigma(t) ** 2, 1.0, rtol=1e-12)


@every
@x64
def test_rates_are_the_derivatives_of_alpha_and_sigma(make):
    s = make()
    t = inside(s)
    if s.t_max == 1000:  # the table's slope is one-sided at integers
        t = jnp.floor(t) + 0.4
    h = 1e-4 * (t - s.t_data) * np.minimum(1.0, (float(s.t_max) - t) / t + 1e-3)
    d_alpha, d_sigma = s.rates(t)
    np.testing.assert_allclose(d_alpha, _differences(s.alpha, t, h), rtol=1e-6, atol=3e-9)
    np.testing.assert_allclose(d_sigma, _differences(s.sigma, t, h), rtol=1e-6, atol=3e-9)


@pytest.mark.parametrize("variance", [0.0, 0.25, 3.0])
@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("edm", 0.01, 20.0), ("vp_linear", 0.01, 1.0), ("cosine", 0.05, 0.95),
        ("cosine_shifted", 0.05, 0.95), ("ddpm_linear", 400.1, 400.9), ("ddpm_linear", 1.1, 1.9),
        ("rectified_flow", 0.05, 0.95),
    ],
)  # fmt: skip
@x64
def test_the_forward_sde_carries_a_gaussian_along_the_path(name, start, end, variance):
    """d var / dt = 2 f var + g^2 from alpha^2 v + sigma^2 at one time ends at it at another."""
    s = SCHEDULES[name]()
    n = 400
    t = jnp.linspace(start, end, 2 * n + 1)
    f, gg, h = np.asarray(s.drift(t)), np.asarray(s.diffusion(t)) ** 2, (end - start) / n
    truth = np.asarray(s.alpha(t)) ** 2 * variance + np.asarray(s.sigma(t)) ** 2
    var = truth[0]
    for i in range(0, 2 * n, 2):  # Runge-Kutta 4
        k1 = 2 * f[i] * var + gg[i]
        k2 = 2 * f[i + 1] * (var + h / 2 * k1) + gg[i + 1]
        k3 = 2 * f[i + 1] * (var + h / 2 * k2) + gg[i + 1]
        k4 = 2 * f[i + 2] * (var + h * k3) + gg[i + 2]
        var += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(var, truth[-1], rtol=1e-6)


@x64
def test_the_vp_sde_has_drift_minus_half_beta_and_diffusion_sqrt_beta():
    s = schedules.vp_linear(0.1, 20.0)
    t = jnp.linspace(1e-3, 1.0, 21)
    beta = 0.1 + t * 19.9
    np.testing.assert_allclose(s.drift(t), -beta / 2, rtol=1e-9)
    np.testing.assert_allclose(s.diffusion(t) ** 2, beta, rtol=1e-8)


@x64
def test_edm_is_the_identity_in_sigma_with_diffusion_sqrt_2_sigma():
    s = schedules.edm()
    t = jnp.geomspace(0.002, 80, 9)
    np.testing.assert_allclose(s.sigma(t), t)
    np.testing.assert_allclose(s.drift(t), 0.0)
    np.testing.assert_allclose(s.diffusion(t) ** 2, 2 * t, rtol=1e-12)


@x64
def test_rectified_flow_is_the_straight_line_from_data_to_noise():
    s = schedules.rectified_flow()
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(s.alpha(t), 1 - t)
    np.testing.assert_allclose(s.sigma(t), t)
    assert (s.t_min, s.t_max) == (0.0, 1.0)


def test_the_continuous_vp_schedule_has_edms_published_noise_levels():
    s = schedules.vp_linear()
    np.testing.assert_allclose(s.sigma_ratio(jnp.asarray([1.0, 1e-3])), [152.167, 0.010486], 5e-5)


@x64
def test_the_ddpm_table_has_its_published_ends():
    s = schedules.ddpm_linear()
    np.testing.assert_allclose(s.alpha(1000) ** 2, 4.035830e-5, rtol=2e-7)
    np.testing.assert_allclose(s.sigma_ratio(1000), 157.4073, rtol=5e-7)
    np.testing.assert_allclose(s.sigma_ratio(1), (1e-4 / (1 - 1e-4)) ** 0.5, rtol=1e-10)


@x64
def test_the_ddpm_table_is_the_float64_cumulative_product_at_integers():
    s = schedules.ddpm_linear()
    abar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    t = np.arange(1, 1001)
    np.testing.assert_allclose(s.alpha(t) ** 2, abar, rtol=1e-9)
    np.testing.assert_allclose(s.sigma(t) ** 2, 1 - abar, rtol=1e-9)


@x64
def test_a_table_from_stable_diffusions_betas_has_its_published_ends():
    s = schedules.from_betas(list(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    np.testing.assert_allclose(s.alpha(1000), 0.068265, rtol=1e-5)
    np.testing.assert_allclose(s.sigma_ratio(jnp.asarray([1, 1000])), [0.029167, 14.6146], 2e-5)


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


@x64
def test_cosine_is_nichol_and_dhariwals_without_their_offset():
    s = schedules.cosine()
    t = inside(s, 21)
    np.testing.assert_allclose(s.alpha(t), np.cos(np.pi * np.asarray(t) / 2), rtol=1e-8)
    np.testing.assert_allclose(s.sigma(t), np.sin(np.pi * np.asarray(t) / 2), rtol=1e-8)


@x64
def test_cosine_limits_bound_the_logsnr_of_its_domain():
    s = schedules.cosine(-13.0, 9.0)
    np.testing.assert_allclose(s.logsnr(s.t_min), 9.0, rtol=1e-9)
    np.testing.assert_allclose(s.logsnr(s.t_max), -13.0, rtol=1e-9)


@x64
def test_a_shift_adds_twice_its_logarithm_to_the_logsnr():
    """shift = 64 / d: less SNR at a higher resolution (Hoogeboom et al. 2023)."""
    t = jnp.linspace(0.05, 0.95, 9)
    plain, shifted = schedules.cosine(), schedules.cosine(shift=64 / 256)
    np.testing.assert_allclose(shifted.logsnr(t) - plain.logsnr(t), 2 * np.log(64 / 256), rtol=1e-9)


@pytest.mark.parametrize("lowest", [-30.0, -60.0])
def test_cosine_stays_finite_up_to_nearly_pure_noise(lowest):
    s = schedules.cosine(logsnr_min=lowest)
    alpha, sigma = float(s.alpha(s.t_max)), float(s.sigma(s.t_max))
    assert 0.0 <= alpha < 1e-6
    assert sigma == pytest.approx(1.0)


def test_a_vmapped_number_gives_the_loops_result():
    t = jnp.linspace(0.1, 0.9, 5)
    betas = jnp.asarray([10.0, 15.0, 20.0])
    many = jax.vmap(lambda b: schedules.vp_linear(0.1, b).sigma(t))(betas)
    loop = [schedules.vp_linear(0.1, float(b)).sigma(t) for b in betas]
    np.testing.assert_allclose(many, np.stack(loop), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "value", "t"),
    [
        (lambda b: schedules.vp_linear(0.1, b), 20.0, 0.5),
        (lambda b: schedules.vp_linear(b, 20.0), 0.1, 0.5),
        (lambda shift: schedules.cosine(shift=shift), 0.7, 0.5),
    ],
    ids=["beta_max", "beta_min", "shift"],
)
@pytest.mark.parametrize("what", ["sigma", "alpha", "logsnr", "time"])
@x64
def test_a_schedule_is_differentiable_in_its_numbers(make, value, t, what):
    t = 1.3 if what == "time" else t
    f = lambda number: getattr(make(number), what)(jnp.asarray(t))
    gradient = jax.grad(f)(value)
    np.testing.assert_allclose(gradient, _differences(f, value, 1e-4), rtol=1e-7)
    assert abs(float(gradient)) > 1e-6


def test_a_tables_entries_are_leaves_to_learn():
    s = schedules.ddpm_linear(T=4)
    gradient = jax.grad(lambda s: s.sigma(jnp.asarray(2.0)))(s).table
    assert (np.asarray(gradient) != 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float16])
@every
def test_times_of_low_precision_are_computed_in_float32(make, dtype):
    s = make()
    t = jnp.asarray([1], dtype) if s.t_max > 1 else jnp.asarray([0.5], jnp.bfloat16)
    assert s.sigma(t).dtype == jnp.float32
    np.testing.assert_allclose(s.sigma(t), s.sigma(t.astype(jnp.float32)), rtol=1e-6)


@every
@pytest.mark.filterwarnings("error")
def test_numpys_float64_times_are_taken_without_a_warning(make):
    s = make()
    t = np.asarray(inside(s), np.float64)
    np.testing.assert_array_equal(s.sigma(t), s.sigma(t.astype(np.float32)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: schedules.edm(80.0, 0.002), r"edm: sigma_min=80.0 must be below sigma_max=0.002"),
        (lambda: schedules.vp_linear(20.0, 0.1), r"allowed are 0 < beta_min <= beta_max"),
        (lambda: schedules.cosine(20.0, -20.0), r"logsnr_min=20.0 must be below logsnr_max=-20.0"),
        (lambda: schedules.ddpm_linear(T=1), r"T=1 given; a table needs at least 2 steps"),
        (lambda: schedules.from_betas([0.1, 1.5]), r"betas\[1\]=1.5 given; allowed are 0 < beta"),
        (lambda: schedules.first("cosine"), r"schedule: .* given 'cosine'"),
    ],
)
def test_an_impossible_schedule_is_refused_by_name_and_value(make, said):
    with pytest.raises(UserError, match=said):
        make()
