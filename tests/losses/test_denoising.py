"""Training losses: their value at the optimum in closed form, and one loss written six ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, at

from jdiff import UserError, denoisers, losses, schedules, weightings
from jdiff.predictions import corrupt, from_x0, parameterization

TARGETS = ["x0", "eps", "v", "score", "velocity", "edm"]
KEY = jax.random.key(0)
EDM = schedules.edm()
MEAN, VAR, MANY = 0.4, 0.3, 50_000


def fixed(t):
    """The time distribution of a single time."""
    return lambda key, n, schedule: jnp.full((n,), t, jnp.float32)


def network(schedule, target, x0_of, sigma_data=0.5, params=0.0):
    """A network whose image estimate is `x0_of(params, x, t)`, whatever it outputs."""
    row = parameterization(target, time="t", sigma_data=sigma_data)

    def apply(params, scaled, t, cond, key):
        x = scaled / row.scale_input(schedule, jnp.ones_like(scaled), t)
        return row.target_of(schedule, *from_x0(schedule, x, x0_of(params, x, t), t)[:2], t)

    return denoisers.network(apply, params, schedule, row)


def _posterior_mean(schedule):
    def x0_of(params, x, t):
        a, b = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        best = MEAN + a * VAR / (a**2 * VAR + b**2) * (x - a * MEAN)
        return best + params

    return x0_of


def _data(n=MANY):
    return MEAN + np.sqrt(VAR) * jax.random.normal(jax.random.key(1), (n, 2))


@pytest.mark.parametrize("name", ["edm", "cosine", "rectified_flow"])
def test_at_the_optimum_the_loss_is_the_posterior_variance_times_the_weight(name):
    s = SCHEDULES[name]()
    t = at(s, 0.7)
    a, b = float(s.alpha(t)), float(s.sigma(t))
    left = VAR * b**2 / (a**2 * VAR + b**2)  # of x0 given x, a dimension
    for weight, expected in [("x0", left), ("eps", left * a**2 / b**2)]:
        each = losses.denoising(
            KEY, network(s, "x0", _posterior_mean(s)), _data(), distribution=fixed(t),
            weighting=weightings.BY_NAME[weight](),
        )  # fmt: skip
        assert each.shape == (MANY,)
        assert float(each.mean()) == pytest.approx(expected, rel=4 / np.sqrt(MANY))


@pytest.mark.parametrize("target", TARGETS)
def test_the_posterior_mean_minimises_every_parameterisations_loss(target):
    """Around it the loss is a parabola: no slope, and the curvature of the weight."""
    t, row = 0.7, parameterization(target)
    loss = lambda shift: losses.denoising(
        KEY, network(EDM, target, _posterior_mean(EDM), params=shift), _data(),
        distribution=fixed(t),
    ).mean()  # fmt: skip
    value, slope = jax.jit(jax.value_and_grad(loss))(0.0)
    weight = float((row.determinant(EDM, jnp.float32(t)) / t) ** 2)
    noise = 4 * 2 * np.sqrt(weight * float(value) / MANY)
    assert abs(float(slope)) < noise
    for shift in (-0.3, 0.3):
        rise = float(jax.jit(loss)(shift) - value) - float(slope) * shift
        assert rise == pytest.approx(weight * shift**2, rel=1e-3)


@pytest.mark.parametrize("weight", ["x0", "eps", "v", "velocity", "edm"])
@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow"])
def test_a_weighting_makes_every_networks_loss_that_of_its_own_space(name, weight):
    """eps() on a v-network is L_simple of the eps-network with the same estimate and draws."""
    s, x0 = SCHEDULES[name](), _data(16)
    guess = lambda params, x, t: 0.3 * x + 0.1

    @jax.jit
    def every():
        one = lambda target, w: losses.denoising(
            KEY, network(s, target, guess), x0, weighting=w,
            distribution=lambda k, n, s: jax.random.uniform(k, (n,), minval=0.1, maxval=0.9),
        )  # fmt: skip
        weighted = [one(target, weightings.BY_NAME[weight]()) for target in TARGETS]
        return one(weight, None), jnp.stack(weighted)

    own, weighted = every()
    np.testing.assert_allclose(weighted, np.broadcast_to(own, weighted.shape), rtol=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weights_are_the_papers(name):
    s, sd = SCHEDULES[name](), 0.6
    t = at(s, [0.05, 0.7, 6.0])
    a, b = (np.asarray(f(t), float) for f in (s.alpha, s.sigma))
    snr = a**2 / b**2
    close = dict(rtol=1e-4)
    np.testing.assert_allclose(weightings.x0()(s, t), 1.0, **close)
    np.testing.assert_allclose(weightings.eps()(s, t), snr, **close)
    np.testing.assert_allclose(weightings.min_snr(5.0)(s, t), np.minimum(snr, 5.0), **close)
    ratio = b / a  # EDM's weight on x / alpha is the same for any scale of x
    edm = (ratio**2 + sd**2) / (ratio * sd) ** 2
    np.testing.assert_allclose(weightings.edm(sd)(s, t), edm, **close)
    if name in ("vp_linear", "cosine", "ddpm_linear"):
        np.testing.assert_allclose(weightings.v()(s, t), snr + 1, **close)
    if name == "rectified_flow":
        np.testing.assert_allclose(weightings.velocity()(s, t), 1 / b**2, **close)


@pytest.mark.parametrize("target", ["velocity", "x0"])
@pytest.mark.parametrize("name", ["rectified_flow", "cosine"])
def test_flow_matching_is_the_squared_error_of_the_velocity_by_hand(name, target):
    """Given the endpoints and the time nothing is random: u is the path's derivative."""
    s, t = SCHEDULES[name](), 0.4
    x0, eps = _data(5), jax.random.normal(jax.random.key(9), (5, 2))
    net = network(s, target, lambda params, x, t: jnp.sin(x))
    made = losses.flow_matching(KEY, net, x0, eps=eps, distribution=fixed(t))
    path = lambda x0, eps: jax.jvp(lambda t: s.alpha(t) * x0 + s.sigma(t) * eps, (t,), (1.0,))[1]
    x = corrupt(s, x0, eps, t)
    x0_hat = np.sin(x)
    eps_hat = (x - s.alpha(t) * x0_hat) / s.sigma(t)
    expected = np.square(path(x0, eps) - path(x0_hat, eps_hat)).mean(1)
    np.testing.assert_allclose(made, expected, rtol=1e-4)


@pytest.mark.parametrize("target", ["velocity", "v", "edm"])
def test_flow_matching_is_finite_at_both_ends_of_the_path(target):
    """sigma = 0 at t = 0, where weight and error in x0 are infinity times zero."""
    flow = schedules.rectified_flow()
    row = parameterization(target, time="t")
    net = denoisers.network(lambda p, x, t, c, k: 0.5 * x, {}, flow, row)
    for t in (1e-8, 1.0):
        assert np.isfinite(losses.flow_matching(KEY, net, _data(4), distribution=fixed(t))).all()


def test_a_perfect_network_has_no_loss_at_all():
    image = jnp.asarray([0.3, -0.8])
    for target in TARGETS:
        net = network(EDM, target, lambda params, x, t: jnp.broadcast_to(image, x.shape))
        loss = losses.denoising(KEY, net, jnp.stack([image] * 8), distribution=fixed(0.5))
        np.testing.assert_allclose(loss, 0.0, atol=1e-8)


def test_the_loss_is_the_mean_over_all_dimensions_of_all_leaves():
    """Not a sum (pitfall 47), and not a mean of means: 2 dimensions of error 1, 6 of error 3."""
    x0 = {"a": jnp.ones((4, 2)), "b": 3 * jnp.ones((4, 3, 2))}
    zero = denoisers.network(
        lambda p, x, t, c, k: jax.tree.map(jnp.zeros_like, x), {}, EDM, parameterization("x0")
    )
    loss = losses.denoising(KEY, zero, x0)
    np.testing.assert_allclose(loss, [(2 * 1 + 6 * 9) / 8] * 4, rtol=1e-6)


def test_each_leaf_is_weighted_by_its_own_schedule():
    tree = {"a": EDM, "b": schedules.rectified_flow()}
    x0 = {"a": jnp.ones((2, 1)), "b": jnp.ones((2, 3))}
    zero = denoisers.network(
        lambda p, x, t, c, k: jax.tree.map(jnp.zeros_like, x), {}, tree, parameterization("x0")
    )
    loss = losses.denoising(KEY, zero, x0, distribution=fixed(0.5), weighting=weightings.eps())
    np.testing.assert_allclose(loss, [(4.0 * 1 + 1.0 * 3) / 4] * 2, rtol=1e-5)  # SNR 4 and 1


def test_a_coupling_gives_the_other_endpoint():
    """With eps = x0 the state is (alpha + sigma) x0: nothing is drawn but the time."""
    seen = {}

    def apply(params, x, t, cond, key):
        seen.update(x=x, cond=cond, key=key)
        return x

    s, x0 = schedules.rectified_flow(), _data(3)
    net = denoisers.network(apply, {}, s, parameterization("velocity"))
    dropout = jax.random.key(5)
    loss = losses.denoising(KEY, net, x0, {"label": 7}, eps=x0, dropout_key=dropout)
    np.testing.assert_allclose(seen["x"], x0, rtol=1e-6)
    assert (seen["cond"], seen["key"]) == ({"label": 7}, dropout)
    np.testing.assert_allclose(loss, np.square(x0).mean(1), rtol=1e-5)  # the target is 0


def test_times_and_noise_are_drawn_apart_and_for_each_sample():
    seen = {}

    def apply(params, x, t, cond, key):
        seen.update(x=x, t=t)
        return x

    net = denoisers.network(apply, {}, schedules.vp_linear(), parameterization("eps"))
    losses.denoising(KEY, net, jnp.zeros((4096, 1)))
    noise = np.asarray(seen["x"][:, 0] / net.schedule.sigma(seen["t"]))
    assert len(np.unique(seen["t"])) > 4000
    assert noise.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * 4096))
    assert abs(np.corrcoef(noise, seen["t"])[0, 1]) < 4 / np.sqrt(4096)


def test_the_loss_is_float32_for_a_half_precision_network():
    net = denoisers.network(
        lambda p, x, t, c, k: x.astype(jnp.bfloat16), {}, EDM, parameterization("edm")
    )
    assert losses.denoising(KEY, net, _data(4)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: weightings.min_snr(0.0), "min_snr: gamma=0.0 given; it must be positive"),
        (lambda: weightings.edm(-1.0), "sigma_data=-1.0 given; it must be positive"),
    ],
)
def test_a_weightings_number_out_of_range_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
