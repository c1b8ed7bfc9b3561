"""Noise schedules: the path x_t = alpha x0 + sigma eps, its logSNR and its SDE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import ALL_SCHEDULES, SCHEDULES, ends, inside, x64

from jdiff import UserError, schedules

every = pytest.mark.parametrize("name", ALL_SCHEDULES)
EXPLODING = ["edm", "ve", "ve_sqrt", "ncsn"]
CONVEX = ["rectified_flow", "polynomial", "shifted_flow", "shifted_polynomial"]
SUB = ["sub_vp", "shifted_sub_vp"]
PRESERVING = [name for name in ALL_SCHEDULES if name not in EXPLODING + CONVEX + SUB]


@jax.jit
def _quantities(s, t):
    """All that a schedule offers at times t, in one program."""
    logsnr, slope = jax.jvp(s.logsnr, (t,), (jnp.ones_like(t),))
    return {
        "t": t, "alpha": s.alpha(t), "sigma": s.sigma(t), "logsnr": logsnr, "slope": slope,
        "again": s.time(logsnr), "rates": jnp.stack(s.rates(t), -1),
        "drift": s.drift(t), "diffusion": s.diffusion(t), "sigma_ratio": s.sigma_ratio(t),
    }  # fmt: skip


@functools.cache
def parts(name, bits=64):
    """`_quantities` of a schedule by name as numpy arrays, each over four sets of times.

    "all": the domain; "beside": h apart by [-2, -1, 0, 1, 2], off a table's steps, where its slope
    is one-sided; "span": evenly spaced, between two steps of a table; "data": t_data.
    """
    with jax.enable_x64(False):
        low, high = ends(ALL_SCHEDULES[name]())
    with jax.enable_x64(bits == 64):
        s = ALL_SCHEDULES[name]()
        near = (high - low) * np.geomspace(1e-4, 0.5, 20)
        t = np.concatenate([np.linspace(low, high, 41), low + near, high - near])
        t = np.unique(t.astype(np.float32)).astype(float)  # the same in either precision
        t = t[(t >= low) & (t <= high)]
        middle = np.linspace(low, high, 13)[1:-1]
        if s.T is not None:
            middle = np.floor(middle) + 0.4
        h = 1e-4 * middle * np.minimum(1, (high - middle) / middle)
        beside = middle[:, None] + h[:, None] * np.arange(-2, 3)
        span = np.linspace(0.95 * low + 0.05 * high, 0.05 * low + 0.95 * high, 401)
        if s.T is not None:
            span = np.linspace(0.4 * s.T + 0.1, 0.4 * s.T + 0.9, 401)
        times = np.concatenate([t, beside.ravel(), span, [s.t_data]])
        out = _quantities(s, jnp.asarray(times, jnp.result_type(float)))
        out = {k: np.asarray(v) for k, v in out.items()}
    cuts = np.cumsum([len(t), beside.size, len(span)])
    sets = [{k: np.split(v, cuts)[i] for k, v in out.items()} for i in range(4)]
    sets[1] = {k: v.reshape(*beside.shape, *v.shape[1:]) for k, v in sets[1].items()}
    return dict(zip(("all", "beside", "span", "data"), sets)) | {"h": h}


def at(name, bits=64):
    """`_quantities` over the domain."""
    return parts(name, bits)["all"]


@pytest.mark.parametrize("bits", [32, 64])
@every
def test_the_data_is_alpha_one_and_sigma_zero_exactly(name, bits):
    s = parts(name, bits)["data"]
    assert [float(s[what][0]) for what in ("alpha", "sigma", "logsnr")] == [1.0, 0.0, np.inf]
    assert s["again"][0] == s["t"][0] == ALL_SCHEDULES[name]().t_data


@every
def test_the_domain_lies_above_the_data(name):
    s = ALL_SCHEDULES[name]()
    assert s.t_data <= s.t_min < s.t_max


@every
def test_logsnr_is_twice_log_alpha_over_sigma(name):
    s = at(name)
    np.testing.assert_allclose(s["logsnr"], 2 * np.log(s["alpha"] / s["sigma"]), 1e-8, 1e-9)
    np.testing.assert_allclose(s["sigma_ratio"], s["sigma"] / s["alpha"], rtol=1e-8)


@pytest.mark.parametrize("bits", [32, 64])
@every
def test_logsnr_falls_strictly_with_t(name, bits):
    assert (np.diff(at(name, bits)["logsnr"]) < 0).all()
    assert (at(name, bits)["slope"] < 0).all()


@every
def test_time_inverts_logsnr_in_float64(name):
    s = at(name)
    np.testing.assert_allclose(s["again"], s["t"], rtol=1e-9, atol=1e-12)


@every
def test_time_inverts_logsnr_to_the_accuracy_of_float32(name):
    """One rounding of logsnr moves t by eps |logsnr| / |d logsnr / dt|: a few of these at most."""
    s, exact = at(name, 32), at(name)
    one_rounding = 6e-8 * (np.abs(s["t"]) + (1 + np.abs(s["logsnr"])) / np.abs(exact["slope"]))
    assert (np.abs(s["again"] - s["t"]) < 6 * one_rounding).all()


@every
def test_float32_keeps_its_digits_up_to_both_ends(name):
    """At the same t, float32 agrees with float64: alpha and sigma to a relative 3e-6.

    A wrapper's alpha near pure noise is a difference of its base's: to two roundings of 1.
    """
    s, exact = at(name, 32), at(name)
    atol = 1.2e-7 if name.startswith(("zero_terminal", "shifted")) else 0.0
    np.testing.assert_array_equal(s["t"], exact["t"])
    for what in ("alpha", "sigma"):
        np.testing.assert_allclose(s[what], exact[what], rtol=3e-6, atol=atol)
    rounding = 3e-6 + 2 * atol / exact["alpha"]
    assert (np.abs(s["logsnr"] - exact["logsnr"]) < rounding + 1e-6 * np.abs(s["logsnr"])).all()


@every
def test_rates_are_the_derivatives_of_alpha_and_sigma(name):
    s, h = parts(name)["beside"], parts(name)["h"]
    rates = s["rates"][:, 2]
    for rate, f in zip(rates.T, (s["alpha"].T, s["sigma"].T)):
        expected = (f[0] - 8 * f[1] + 8 * f[3] - f[4]) / (12 * h)
        np.testing.assert_allclose(rate, expected, rtol=1e-6, atol=3e-9 * np.abs(rates).max())


@pytest.mark.parametrize("variance", [0.0, 0.25, 3.0])
@every
def test_the_forward_sde_carries_a_gaussian_along_the_path(name, variance):
    """d var / dt = 2 f var + g^2 from alpha^2 v + sigma^2 at one time ends at it at another."""
    s = parts(name)["span"]
    f, gg, h = s["drift"], s["diffusion"] ** 2, s["t"][2] - s["t"][0]
    truth = s["alpha"] ** 2 * variance + s["sigma"] ** 2
    var = truth[0]
    for i in range(0, len(f) - 1, 2):  # Runge-Kutta 4
        k1 = 2 * f[i] * var + gg[i]
        k2 = 2 * f[i + 1] * (var + h / 2 * k1) + gg[i + 1]
        k3 = 2 * f[i + 1] * (var + h / 2 * k2) + gg[i + 1]
        k4 = 2 * f[i + 2] * (var + h * k3) + gg[i + 2]
        var += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(var, truth[-1], rtol=1e-6)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_preserving_paths_keep_the_variance(name):
    s = at(name)
    np.testing.assert_allclose(s["alpha"] ** 2 + s["sigma"] ** 2, 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", EXPLODING)
def test_exploding_paths_keep_the_data(name):
    np.testing.assert_array_equal(at(name)["alpha"], 1.0)
    np.testing.assert_array_equal(at(name)["drift"], 0.0)


@pytest.mark.parametrize("name", CONVEX)
def test_convex_paths_are_straight(name):
    np.testing.assert_allclose(at(name)["alpha"] + at(name)["sigma"], 1.0, rtol=1e-12)


# Closed forms, written from the papers in numpy.


def _vp_integral(t):
    return 0.1 * t + 0.5 * 19.9 * t**2


def _sigmoid_gamma(start, end, tau):
    """Chen 2023, algorithm 1, without the clip."""
    S = lambda x: 1 / (1 + np.exp(-x))
    low, high = S(start / tau), S(end / tau)
    return lambda t: (high - S((t * (end - start) + start) / tau)) / (high - low)


def _preserving(alpha):
    return alpha, lambda t: np.sqrt(1 - alpha(t) ** 2)


def _sd3(t, s):
    """Esser et al. 2024, equation 23."""
    return s * t / (1 + (s - 1) * t)


PATHS = {
    "edm": (np.ones_like, lambda t: t),
    "ve": (np.ones_like, lambda t: 0.01 * (50 / 0.01) ** t),
    "ve_sqrt": (np.ones_like, np.sqrt),
    "vp_linear": _preserving(lambda t: np.exp(-0.5 * _vp_integral(t))),
    "sub_vp": (lambda t: np.exp(-0.5 * _vp_integral(t)), lambda t: 1 - np.exp(-_vp_integral(t))),
    "cosine": (lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
    "gvp": (lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
    "sigmoid": _preserving(lambda t: np.sqrt(_sigmoid_gamma(-3, 3, 1)(t))),
    "sigmoid_skewed": _preserving(lambda t: np.sqrt(_sigmoid_gamma(0, 3, 0.7)(t))),
    "linear_vp": _preserving(lambda t: 1 - t),
    "linear_gamma": _preserving(lambda t: np.sqrt(1 - t)),
    "linear_logsnr": _preserving(lambda t: 1 / np.sqrt(1 + np.exp(-13.3 + 18.3 * t))),
    "rectified_flow": (lambda t: 1 - t, lambda t: t),
    "polynomial": (lambda t: (1 - t) ** 1.5, lambda t: 1 - (1 - t) ** 1.5),
    "shifted_flow": (lambda t: 1 - _sd3(t, 3.0), lambda t: _sd3(t, 3.0)),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_the_papers(name):
    s = at(name)
    for what, formula in zip(("alpha", "sigma"), PATHS[name]):
        np.testing.assert_allclose(s[what], formula(s["t"]), rtol=2e-8, atol=1e-12)


_beta = lambda t: 0.1 + 19.9 * t
_integral_rate = lambda t: np.exp(-2 * _vp_integral(t))
SDES = {  # drift f and diffusion g^2
    "edm": (lambda t: 0 * t, lambda t: 2 * t),
    "ve_sqrt": (lambda t: 0 * t, np.ones_like),
    "ve": (lambda t: 0 * t, lambda t: 2 * np.log(5000) * (0.01 * 5000**t) ** 2),
    "vp_linear": (lambda t: -_beta(t) / 2, _beta),
    "sub_vp": (lambda t: -_beta(t) / 2, lambda t: _beta(t) * (1 - _integral_rate(t))),
    "rectified_flow": (lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
    "linear_vp": (lambda t: -1 / (1 - t), lambda t: 2 / (1 - t)),
    "linear_gamma": (lambda t: -0.5 / (1 - t), lambda t: 1 / (1 - t)),
    "gvp": (
        lambda t: -np.pi / 2 * np.tan(np.pi * t / 2), lambda t: np.pi * np.tan(np.pi * t / 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SDES)
def test_the_sde_is_the_papers(name):
    """Song et al. 2021, equations 9, 11 and 28 to 30; VP: f = -beta / 2 and g^2 = beta."""
    s, (drift, squared) = parts(name)["span"], SDES[name]
    np.testing.assert_allclose(s["drift"], drift(s["t"]), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(s["diffusion"] ** 2, squared(s["t"]), rtol=1e-8)


@pytest.mark.parametrize("sigma", [1e-3, 2e-3, 0.01])
@pytest.mark.parametrize("name", ["edm", "ve", "vp_linear", "sub_vp", "cosine", "rectified_flow"])
def test_small_noise_levels_are_reached_and_left_without_loss(name, sigma):
    s = ALL_SCHEDULES[name]()
    t = s.time(jnp.float32(-2 * np.log(sigma)))
    np.testing.assert_allclose(s.sigma_ratio(t), sigma, rtol=3e-6)


def test_the_continuous_vp_schedule_has_edms_published_noise_levels():
    s = schedules.vp_linear()
    np.testing.assert_allclose(s.sigma_ratio(jnp.asarray([1.0, 1e-3])), [152.167, 0.010486], 5e-5)


@pytest.mark.parametrize("name", ["gvp", "rectified_flow", "linear_vp", "shifted_flow"])
def test_paths_of_finite_velocity_have_it_at_pure_noise_too(name):
    """The first call of a velocity model is at t = 1, where the logSNR is -inf."""
    s = ALL_SCHEDULES[name]()
    d_alpha, d_sigma = s.rates(jnp.asarray(1.0))
    slope = {"gvp": -np.pi / 2, "shifted_flow": -1 / 3}.get(name, -1.0)
    np.testing.assert_allclose(d_alpha, slope, rtol=1e-6)
    np.testing.assert_allclose(d_sigma, 1 / 3 if name == "shifted_flow" else -slope * (
        name == "rectified_flow"), atol=1e-6)  # fmt: skip
    assert float(s.alpha(1.0)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", ["shifted_polynomial", "shifted_linear_vp", "shifted_gvp"])
def test_a_shift_keeps_the_velocity_at_pure_noise_finite(name):
    with jax.enable_x64(True):
        s = ALL_SCHEDULES[name]()
        for rate, f in zip(s.rates(jnp.asarray(1.0)), (s.alpha, s.sigma)):
            h = 1e-5
            np.testing.assert_allclose(rate, (f(1.0) - f(1 - h)) / h, atol=1e-2)


# Learning.


def _differences(f, t, h):
    """d f / dt by the five-point rule."""
    return (f(t - 2 * h) - 8 * f(t - h) + 8 * f(t + h) - f(t + 2 * h)) / (12 * h)


def test_the_monotone_schedule_has_its_ends_and_goes_on_beyond_them():
    s = schedules.monotone(jax.random.key(1), -4.0, 9.0, hidden=16)
    np.testing.assert_allclose(s.logsnr(jnp.asarray([0.0, 1.0])), [9.0, -4.0], atol=1e-5)
    far = jnp.asarray([-30.0, 40.0, 200.0])
    np.testing.assert_allclose(s.logsnr(s.time(far)), far, rtol=1e-5)
    assert float(s.time(jnp.inf)) == s.t_data == -np.inf


@x64
def test_the_inverse_of_the_monotone_schedule_is_differentiable_in_everything():
    s = schedules.monotone(jax.random.key(1), hidden=4)
    value = jnp.asarray(3.0)
    leaves, tree = jax.tree.flatten(s)
    flat = jnp.concatenate([jnp.ravel(a) for a in leaves])
    cuts = np.cumsum([a.size for a in leaves])[:-1]

    def time(flat, value):
        parts = [p.reshape(a.shape) for p, a in zip(jnp.split(flat, cuts), leaves)]
        return tree.unflatten(parts).time(value)

    gradient, slope = jax.jit(jax.grad(time, (0, 1)))(flat, value)
    time = jax.jit(time)
    for i in range(len(flat)):
        one = jnp.zeros_like(flat).at[i].set(1.0)
        expected = _differences(lambda e, one=one: time(flat + e * one, value), 0.0, 1e-3)
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(slope, _differences(lambda v: time(flat, v), 3.0, 1e-3), rtol=1e-8)


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
        (lambda n: schedules.polynomial(n), 1.5, 0.5),
        (lambda shift: schedules.shifted(schedules.sub_vp(), shift), 0.7, 0.5),
    ],
    ids=["beta_max", "beta_min", "cosine_shift", "n", "shift"],
)
@x64
def test_a_schedule_is_differentiable_in_its_numbers(make, value, t):
    def all_of(number):
        s, t_ = make(number), jnp.asarray(t)
        return jnp.stack([s.sigma(t_), s.alpha(t_), s.logsnr(t_), s.time(jnp.asarray(1.3))])

    f = jax.jit(all_of)
    gradient = jax.jit(jax.jacfwd(all_of))(value)
    np.testing.assert_allclose(gradient, _differences(f, value, 1e-4), rtol=1e-7)
    assert (np.abs(gradient) > 1e-6).all()


def test_a_tables_entries_are_leaves_to_learn():
    s = schedules.ddpm_linear(T=4)
    gradient = jax.grad(lambda s: s.sigma(jnp.asarray(2.0)))(s).table
    assert (np.asarray(gradient) != 0).tolist() == [False, True, False, False]


# Precision and refusals.


@x64
def test_cosine_limits_bound_the_logsnr_of_its_domain():
    s = schedules.cosine(-13.0, 9.0)
    np.testing.assert_allclose(s.logsnr(s.t_min), 9.0, rtol=1e-9)
    np.testing.assert_allclose(s.logsnr(s.t_max), -13.0, rtol=1e-9)


@pytest.mark.parametrize("lowest", [-30.0, -60.0])
def test_cosine_stays_finite_up_to_nearly_pure_noise(lowest):
    s = schedules.cosine(logsnr_min=lowest)
    alpha, sigma = float(s.alpha(s.t_max)), float(s.sigma(s.t_max))
    assert 0.0 <= alpha < 1e-6
    assert sigma == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_times_of_low_precision_are_computed_in_float32(name, dtype):
    s = SCHEDULES[name]()
    t = jnp.asarray([1], dtype) if s.t_max > 1 else jnp.asarray([0.5], jnp.bfloat16)
    assert s.sigma(t).dtype == jnp.float32
    np.testing.assert_allclose(s.sigma(t), s.sigma(t.astype(jnp.float32)), rtol=1e-6)


@every
def test_float32_and_float64_pass_through(name):
    for bits in (32, 64):
        s = at(name, bits)
        for what in ("alpha", "sigma", "logsnr", "again", "drift", "diffusion"):
            assert s[what].dtype == np.dtype(f"float{bits}"), what


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("error")
def test_numpys_float64_times_are_taken_without_a_warning(name):
    s = SCHEDULES[name]()
    t = np.asarray(inside(s), np.float64)
    np.testing.assert_array_equal(s.sigma(t), s.sigma(t.astype(np.float32)))


def test_every_named_schedule_is_proven_here():
    made = {type(make()) for make in ALL_SCHEDULES.values()}
    assert {type(make()) for make in schedules.BY_NAME.values()} <= made


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: schedules.edm(80.0, 0.002), r"edm: sigma_min=80.0 must be below sigma_max=0.002"),
        (lambda: schedules.edm(-1.0, 80.0), r"edm: sigma_min=-1.0 given; it must be positive"),
        (lambda: schedules.ve(0.0, 50.0), r"ve: sigma_min=0.0 given; it must be positive"),
        (lambda: schedules.ve_sqrt(-1.0), r"ve_sqrt: sigma_min=-1.0 given; it must be positive"),
        (lambda: schedules.cosine(shift=-1.0), r"cosine: shift=-1.0 given; it must be positive"),
        (lambda: schedules.vp_linear(20.0, 0.1), r"allowed are 0 < beta_min <= beta_max"),
        (lambda: schedules.sub_vp(0.0, 0.1), r"sub_vp: .* allowed are 0 < beta_min <= beta_max"),
        (lambda: schedules.cosine(20.0, -20.0), r"logsnr_min=20.0 must be below logsnr_max=-20.0"),
        (lambda: schedules.sigmoid(tau=0.0), r"sigmoid: tau=0.0 given; it must be positive"),
        (lambda: schedules.polynomial(0), r"polynomial: n=0 given; it must be positive"),
        (lambda: schedules.ddpm_linear(T=1), r"T=1 given; a table needs at least 2 steps"),
        (lambda: schedules.squared_cosine(T=1), r"squared_cosine: T=1 given"),
        (lambda: schedules.ncsn(sigma_min=2.0), r"ncsn: sigma_min=2.0 must be below sigma_max=1.0"),
        (lambda: schedules.from_betas([0.1, 1.5]), r"betas\[1\]=1.5 given; allowed are 0 < beta"),
        (lambda: schedules.zero_terminal_snr(schedules.edm()), r"EDM has .* variance-preserving"),
        (lambda: schedules.shifted(schedules.edm(), 0.0), r"shifted: shift=0.0 given"),
        (lambda: schedules.first("cosine"), r"schedule: .* given 'cosine'"),
    ],
)  # fmt: skip
def test_an_impossible_schedule_is_refused_by_name_and_value(make, said):
    with pytest.raises(UserError, match=said):
        make()
