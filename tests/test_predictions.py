"""The hub: every parameterisation is a row of one affine table, checked against its textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at, inside, same, x64

from jdiff import UserError, predictions, schedules
from jdiff.predictions import Prediction, corrupt, endpoint_velocity, from_x0, parameterization

TARGETS = ["x0", "eps", "v", "score", "velocity", "edm"]
SIGMA_DATA = 0.7

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_target = pytest.mark.parametrize("target", TARGETS)


def _draw(name, dims=3):
    """(schedule, t, x0, eps), numbers that no formula likes."""
    s = SCHEDULES[name]()
    t = jnp.asarray(inside(s, 5))
    t = jnp.floor(t) + 0.4 if name == "ddpm_linear" else t
    k0, k1 = jax.random.split(jax.random.key(3))
    x0, eps = (jax.random.normal(k, (len(t), dims), t.dtype) + 0.3 for k in (k0, k1))
    return s, t, x0, eps


def _textbook(target, s, t, x0, eps):
    """Each target from its paper's definition, sample by sample, in numpy."""
    a, b = np.asarray(s.alpha(t))[:, None], np.asarray(s.sigma(t))[:, None]
    x0, eps = np.asarray(x0), np.asarray(eps)
    x = a * x0 + b * eps
    if target == "v":  # Salimans and Ho 2022
        return a * eps - b * x0
    if target == "score":  # of N(x; alpha x0, sigma^2) at x
        return -(x - a * x0) / b**2
    if target == "velocity":  # d x_t / dt at fixed endpoints
        path = lambda u: s.alpha(u)[:, None] * x0 + s.sigma(u)[:, None] * eps
        return np.asarray(jax.jvp(path, (t,), (jnp.ones_like(t),))[1])
    if target == "edm":  # Karras et al. 2022, table 1, on x / alpha with sigma / alpha
        sigma, x = b / a, x / a
        c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
        c_out = sigma * SIGMA_DATA / np.sqrt(sigma**2 + SIGMA_DATA**2)
        return (x0 - c_skip * x) / c_out
    return {"x0": x0, "eps": eps}[target]


@every_schedule
@every_target
@x64
def test_each_target_is_its_textbook_definition(target, name):
    s, t, x0, eps = _draw(name)
    ours = parameterization(target, sigma_data=SIGMA_DATA).target_of(s, x0, eps, t)
    np.testing.assert_allclose(ours, _textbook(target, s, t, x0, eps), rtol=1e-7, atol=1e-9)


@every_schedule
@every_target
@x64
def test_a_perfect_output_gives_back_both_endpoints(target, name):
    s, t, x0, eps = _draw(name)
    row = parameterization(target, sigma_data=SIGMA_DATA)
    x = corrupt(s, x0, eps, t)
    same(row.prediction(s, row.target_of(s, x0, eps, t), x, t), Prediction(x0, eps), 1e-6, 1e-8)


@every_schedule
@every_target
@x64
def test_any_output_at_all_gives_endpoints_that_mix_to_x(target, name):
    s, t, x, output = _draw(name)
    row = parameterization(target, sigma_data=SIGMA_DATA)
    same(corrupt(s, *row.prediction(s, output, x, t)[:2], t), x, 1e-6, 1e-7)


@every_target
def test_an_error_in_the_output_is_minus_sigma_over_the_determinant_in_x0(target):
    s, t, x0, eps = _draw("cosine")
    row = parameterization(target, sigma_data=SIGMA_DATA)
    x = corrupt(s, x0, eps, t)
    x0_of = lambda f: row.prediction(s, f, x, t).x0
    _, response = jax.jvp(x0_of, (x,), (jnp.ones_like(x),))
    same(response, jnp.broadcast_to((-s.sigma(t) / row.determinant(s, t))[:, None], x.shape))


@pytest.mark.parametrize("name", ["edm", "cosine"])
@every_target
@pytest.mark.parametrize("source", TARGETS)
@x64
def test_every_target_converts_to_every_other(source, target, name):
    s, t, x0, eps = _draw(name)
    x = corrupt(s, x0, eps, t)
    made = predictions.convert(
        jnp.asarray(_textbook(source, s, t, x0, eps)),
        parameterization(source, sigma_data=SIGMA_DATA),
        parameterization(target, sigma_data=SIGMA_DATA), s, x, t,
    )  # fmt: skip
    np.testing.assert_allclose(made, _textbook(target, s, t, x0, eps), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
@x64
def test_edm_preconditioning_is_table_1(sigma):
    s, row, sd = schedules.edm(), parameterization("edm", sigma_data=0.5), 0.5
    t, x, f = jnp.asarray([sigma]), jnp.asarray([[1.7]]), jnp.asarray([[-0.6]])
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / np.sqrt(sd**2 + sigma**2)
    np.testing.assert_allclose(row.prediction(s, f, x, t).x0, c_skip * x + c_out * f, rtol=1e-12)
    np.testing.assert_allclose(row.scale_input(s, x, t), x / np.sqrt(sigma**2 + sd**2), rtol=1e-12)
    np.testing.assert_allclose(row.condition_time(s, t), np.log(sigma) / 4, rtol=1e-6)


@every_schedule
@x64
def test_edm_scales_input_and_target_to_unit_variance(name):
    """For any schedule: x0 of variance s^2 and unit noise, by the variance of an affine map."""
    s, t, *_ = _draw(name)
    row, sd = parameterization("edm", sigma_data=SIGMA_DATA), SIGMA_DATA
    on_x0, on_eps = row.row(s, t)
    np.testing.assert_allclose((on_x0 * sd) ** 2 + on_eps**2, 1.0, rtol=1e-9)
    c_in = row.scale_input(s, jnp.ones((len(t), 1)), t)[:, 0]
    variance = c_in**2 * ((s.alpha(t) * sd) ** 2 + s.sigma(t) ** 2)
    np.testing.assert_allclose(variance, 1.0, rtol=1e-9)
    # and the target does not repeat the input: their covariance is zero
    covariance = on_x0 * s.alpha(t) * sd**2 + on_eps * s.sigma(t)
    np.testing.assert_allclose(covariance, 0.0, atol=1e-9)


@every_target
def test_only_edm_scales_the_networks_input(target):
    s, t, x, _ = _draw("edm")
    scaled = parameterization(target).scale_input(s, x, t)
    assert (scaled is x) == (target != "edm")


@pytest.mark.parametrize("target", ["v", "velocity", "edm", "x0"])
def test_pure_noise_at_zero_snr_still_predicts_an_image(target):
    """alpha = 0 at t = 1: x says nothing, the network's output alone must give x0."""
    s, t = schedules.rectified_flow(), jnp.asarray([1.0])
    x0, eps = jnp.asarray([[0.3, -0.8]]), jnp.asarray([[1.1, 0.2]])
    row = parameterization(target, time="t")
    same(row.prediction(s, row.target_of(s, x0, eps, t), eps, t), Prediction(x0, eps))


@every_schedule
@x64
def test_the_endpoint_velocity_is_the_paths_derivative(name):
    s, t, x0, eps = _draw(name)
    h = 1e-5 * t * jnp.minimum(1.0, (s.t_max - t) / t)
    ahead, behind = (corrupt(s, x0, eps, t + d) for d in (h, -h))
    expected = (ahead - behind) / (2 * h[:, None])
    same(endpoint_velocity(s, Prediction(x0, eps), t), expected, 1e-5, 1e-6)


@every_schedule
@x64
def test_the_score_is_the_gradient_of_a_gaussians_log_density(name):
    """x0 ~ N(m, v): E[x0 | x] by linear regression, the score by autodiff of the density."""
    s, t, x, _ = _draw(name, dims=1)
    m, v = 0.4, 0.3
    a, b = s.alpha(t)[:, None], s.sigma(t)[:, None]
    x0 = m + a * v / (a**2 * v + b**2) * (x - a * m)
    log_p = lambda x: jax.scipy.stats.norm.logpdf(x, a * m, jnp.sqrt(a**2 * v + b**2)).sum()
    both = from_x0(s, x, x0, t)
    same(parameterization("score").target_of(s, *both[:2], t), jax.grad(log_p)(x), 1e-7, 1e-9)


@every_schedule
def test_from_x0_keeps_x0_and_mixes_back_to_x(name):
    s, t, x0, x = _draw(name)
    both = from_x0(s, x, x0, t)
    assert both.x0 is x0
    same(corrupt(s, *both[:2], t), x, 1e-4, 1e-4)


def test_corrupt_takes_one_time_for_all_or_one_a_sample():
    s, t, x0, eps = _draw("vp_linear")
    each = [corrupt(s, x0[i : i + 1], eps[i : i + 1], t[i]) for i in range(len(t))]
    same(corrupt(s, x0, eps, t), jnp.concatenate(each))


TREE = {"image": schedules.edm(), "audio": schedules.cosine()}


@every_target
def test_a_tree_of_schedules_gives_each_leaf_its_own(target):
    row, t = parameterization(target, time="t"), jnp.asarray([0.3, 0.6])
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
    x0 = {
        "image": draw(0, (2, 4, 4, 1)),
        "audio": {"left": draw(1, (2, 5)), "right": draw(2, (2, 5))},
    }
    eps = jax.tree.map(lambda a: a[::-1] + 0.1, x0)
    f = row.target_of(TREE, x0, eps, t)
    x = corrupt(TREE, x0, eps, t)
    for name, s in TREE.items():
        same(f[name], row.target_of(s, x0[name], eps[name], t))
        same(x[name], corrupt(s, x0[name], eps[name], t))
        same(row.scale_input(TREE, x, t)[name], row.scale_input(s, x[name], t))
        same(
            endpoint_velocity(TREE, Prediction(x0, eps), t)[name],
            endpoint_velocity(s, Prediction(x0[name], eps[name]), t),
        )
    same(row.prediction(TREE, f, x, t), Prediction(x0, eps), 1e-4, 1e-4)
    assert row.condition_time(TREE, t).keys() == TREE.keys()


def test_a_tree_of_schedules_that_does_not_fit_is_refused():
    x = {"image": jnp.ones((2, 3))}
    with pytest.raises(UserError, match="trees do not match"):
        corrupt({"picture": schedules.edm()}, x, x, jnp.ones(2))


@pytest.mark.parametrize(
    ("name", "time", "expected"),
    [
        ("edm", "log_sigma", lambda s, t: np.log(t) / 4),
        ("cosine", "log_sigma", lambda s, t: np.log(np.tan(np.pi * t / 2)) / 4),
        ("vp_linear", "t1000", lambda s, t: 1000 * t),
        ("vp_linear", "logsnr", lambda s, t: 2 * np.log(s.alpha(t) / s.sigma(t))),
        ("ddpm_linear", "step", lambda s, t: t - 1),
        ("rectified_flow", "t", lambda s, t: t),
    ],
)
def test_the_network_is_told_the_time_it_was_trained_on(name, time, expected):
    s = SCHEDULES[name]()
    t = jnp.asarray(at(s, [0.1, 1.0, 7.0]))
    told = parameterization("v", time=time).condition_time(s, t)
    assert told.dtype == jnp.float32
    np.testing.assert_allclose(told, expected(s, np.asarray(t, float)), rtol=1e-5, atol=1e-5)


def test_integer_steps_in_bfloat16_are_not_rounded_away():
    """bfloat16 holds 507 of the 1000 steps; c_noise is float32 and so holds all."""
    s = schedules.ddpm_linear()
    told = parameterization("eps", time="step").condition_time(s, jnp.arange(1, 1001))
    assert len(np.unique(told)) == 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("epsilon",), "target 'epsilon' is not known. Did you mean 'eps'"),
        (("v", "logsigma"), "time 'logsigma' is not known. Did you mean 'log_sigma'"),
        (("edm", None, 0.0), "sigma_data=0.0 given; it must be positive"),
    ],
)
def test_an_unknown_parameterisation_is_refused_with_the_nearest(arguments, said):
    with pytest.raises(UserError, match=said):
        parameterization(*arguments)


def test_a_learned_variance_is_split_off_the_output_and_told_as_a_share():
    """Second half of the channels, v in [-1, 1] -> [0, 1]; the first half is F as ever."""
    row, s = parameterization("eps", variance="learned_range"), schedules.vp_linear()
    x, t = jnp.ones((2, 4, 4, 3)), jnp.asarray([0.3, 0.6])
    f, v = 0.5 * x, jnp.full_like(x, -0.5)
    told = row.prediction(s, jnp.concatenate([f, v], -1), x, t)
    plain = parameterization("eps").prediction(s, f, x, t)
    np.testing.assert_array_equal(told.eps, plain.eps)
    np.testing.assert_array_equal(told.x0, plain.x0)
    np.testing.assert_allclose(told.variance, 0.25)
    assert plain.variance is None
    with pytest.raises(ValueError, match="learned_range.*3 channels"):
        row.split(x)
