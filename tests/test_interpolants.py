"""Paths of two endpoints and a latent noise: their derivatives, losses' minima and samples.

Endpoints are Gaussian and independent, so that the conditional means are known: (x_t, dx_t/dt, z,
x0) is jointly normal, and each mean is linear in x_t.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64

from jdiff import UserError, denoisers, interpolants, losses, sample, schedules, solvers
from jdiff.predictions import parameterization
from jdiff.pytree import expand
from jdiff.solvers.interpolant import interpolant_sde

KEY = jax.random.key(0)
M0, V0, M1, V1 = 0.8, 0.3, -0.5, 1.2
FLOW = schedules.rectified_flow()
PATHS = {
    "straight": interpolants.straight(0.4),
    "straight_plain": interpolants.straight(),
    "target": interpolants.target(0.1),
    "bridge": interpolants.bridge(0.9),
    "trigonometric": interpolants.trigonometric(),
    "trigonometric_latent": interpolants.trigonometric(0.7),
}
LATENT = ["straight", "bridge", "trigonometric_latent"]

# As the papers write them, with their time s = 1 - t and x_1 their data: mean, deviation.
PI = np.pi
FORMULAS = {
    "straight": lambda s: ((s, 1 - s), 0.4),
    "straight_plain": lambda s: ((s, 1 - s), 0.0),
    "target": lambda s: ((s, 1 - 0.9 * s), 0.0),
    "bridge": lambda s: ((s, 1 - s), 0.9 * np.sqrt(s * (1 - s))),
    "trigonometric": lambda s: ((np.sin(PI * s / 2), np.cos(PI * s / 2)), 0.0),
    "trigonometric_latent": lambda s: (
        (np.sin(PI * s / 2), np.cos(PI * s / 2)), 0.7 * np.sin(PI * s) ** 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
@x64
def test_positions_are_the_papers_and_velocities_their_derivatives(name):
    path, (x0, x1, z) = PATHS[name], np.random.default_rng(0).standard_normal((3, 4, 2))
    t = np.array([0.1, 0.35, 0.6, 0.95])
    (a, b), c = FORMULAS[name](1 - t)
    by = lambda v: np.broadcast_to(v, t.shape)[:, None]
    expected = by(a) * x0 + by(b) * x1 + by(c) * z
    np.testing.assert_allclose(path.position(x0, x1, z, t), expected, rtol=1e-9)
    h = 1e-6
    slope = (path.position(x0, x1, z, t + h) - path.position(x0, x1, z, t - h)) / (2 * h)
    np.testing.assert_allclose(path.velocity(x0, x1, z, t), slope, rtol=1e-6)


def means(path, x, t):
    """E[dx_t/dt | x], E[z | x] and E[x0 | x] for the Gaussian endpoints, by regression on x."""
    t = jnp.minimum(t, 1 - 1e-6)  # at 1 a bridge's gamma gamma' is 0 times infinity
    a, s = path.schedule.alpha(t), path.schedule.sigma(t)
    da, ds = path.schedule.rates(t)
    g, dg = path.gamma(t)
    spread = a**2 * V0 + s**2 * V1 + g**2
    gap = (x - expand(a * M0 + s * M1, x)) / expand(spread, x)
    b = expand(da * M0 + ds * M1, x) + expand(da * a * V0 + ds * s * V1 + dg * g, x) * gap
    return b, expand(g, x) * gap, M0 + expand(a * V0, x) * gap


def networks(path, shift=0.0):
    """The exact velocity and latent noise as networks (off by `shift`)."""
    make = lambda which, target: denoisers.network(
        lambda p, x, t, cond, key: means(path, x, t)[which] + p, shift, FLOW,
        parameterization(target),
    )  # fmt: skip
    return make(0, "velocity"), make(1, "eps")


def endpoints(n):
    z0, z1 = jax.random.normal(jax.random.key(5), (2, n, 2))
    return M0 + np.sqrt(V0) * z0, M1 + np.sqrt(V1) * z1


@pytest.mark.parametrize("name", LATENT)
def test_the_conditional_means_minimise_both_losses(name):
    path, n = PATHS[name], 20_000
    x0, x1 = endpoints(n)
    inside = lambda key, n, s: jax.random.uniform(key, (n,), minval=0.1, maxval=0.9)

    def both(shift):
        b, eta = networks(path, shift)
        take = dict(path=path, eps=x1, distribution=inside)
        flow = losses.conditional_flow(KEY, b, x0, **take)
        return jnp.stack([flow, losses.latent_noise(KEY, eta, x0, **take)])

    at = jax.jit(lambda shift: jax.jvp(both, (shift,), (1.0,)))
    value, slope = (np.asarray(a, float) for a in at(0.0))
    assert value.shape == (2, n)
    value, slope = value.mean(1), slope.mean(1)
    assert (np.abs(slope) < 4 * np.sqrt(4 * value / n)).all()
    rise = np.asarray(at(0.3)[0], float).mean(1) - value
    np.testing.assert_allclose(rise - 0.3 * slope, 0.09, rtol=1e-2)


def test_without_latent_noise_it_is_flow_matching_and_normal_noise_by_default():
    row, at = parameterization("velocity"), lambda key, n, s: jnp.linspace(0.1, 0.9, n)
    sine = lambda p, x, t, c, k: jnp.sin(x)

    @jax.jit
    def run(x0, x1):
        out = []
        for path, schedule in (
            (interpolants.straight(), FLOW), (interpolants.trigonometric(), schedules.gvp()),
            ({"name": "straight"}, FLOW),
        ):  # fmt: skip
            net = denoisers.network(sine, {}, schedule, row)
            out.append((
                losses.conditional_flow(KEY, net, x0, eps=x1, path=path, distribution=at),
                losses.flow_matching(KEY, net, x0, eps=x1, distribution=at),
            ))  # fmt: skip
        zero = denoisers.network(lambda p, x, t, c, k: 0 * x, {}, FLOW, row)
        return out, losses.conditional_flow(KEY, zero, jnp.zeros((4096, 2)))

    pairs, noise = run(*endpoints(64))
    for made, expected in pairs:
        np.testing.assert_allclose(made, expected, rtol=1e-4)
    assert float(noise.mean()) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 8192))


def test_a_draw_is_shared_by_key_and_trees_average_over_all_dimensions():
    x0 = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 3, 2))}
    path = interpolants.bridge(0.5)
    found = losses.interpolants.draw(KEY, path, x0, x0)
    expected = path.position(x0, x0, found.z, found.t)
    jax.tree.map(np.testing.assert_array_equal, found.x, expected)
    zero = denoisers.network(
        lambda p, x, t, c, k: jax.tree.map(jnp.zeros_like, x), {}, FLOW, parameterization("eps")
    )
    key = jax.random.split(KEY)[0]
    z = losses.interpolants.draw(key, path, x0, x0).z
    square = [np.square(leaf).reshape(4, -1) for leaf in jax.tree.leaves(z)]
    made = losses.latent_noise(KEY, zero, x0, path=path, eps=x0)
    np.testing.assert_allclose(made, np.concatenate(square, 1).mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", LATENT)
@x64
def test_score_and_data_follow_from_both_means(name):
    path, t = PATHS[name], jnp.asarray([0.2, 0.5, 0.8])
    x = jnp.asarray([[0.3], [-1.0], [2.0]])
    b, eta, x0 = means(path, x, t)

    def log_density(x, t):
        a, s, g = path.schedule.alpha(t), path.schedule.sigma(t), path.gamma(t)[0]
        return -0.5 * (x - a * M0 - s * M1) ** 2 / (a**2 * V0 + s**2 * V1 + g**2)

    score = jax.vmap(jax.grad(log_density))(x[:, 0], t)
    np.testing.assert_allclose(path.score(eta, t)[:, 0], score, rtol=1e-9)
    np.testing.assert_allclose(path.data(x, b, eta, t), x0, rtol=1e-9)


def test_where_there_is_no_latent_noise_score_and_data_stay_finite():
    path, x = interpolants.bridge(), jnp.ones((2, 1))
    assert (path.score(x, jnp.ones(2)) == 0).all()
    assert np.isfinite(path.data(x, x, x, jnp.ones(2))).all()


N = 20_000


@pytest.mark.parametrize("diffusion", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("name", LATENT)
def test_the_sde_has_the_paths_marginals_at_every_diffusion(name, diffusion):
    """Mean and variance at t = 0.25; a score of the wrong sign or size is far off."""
    path = PATHS[name]
    b, eta = networks(path)
    _, x1 = endpoints(N)
    g1 = float(path.gamma(jnp.asarray(1.0))[0])  # a constant latent noise is in the start too
    x1 = x1 + g1 * jax.random.normal(KEY, x1.shape)
    times = jnp.linspace(1.0, 0.25, 65)
    solver = interpolant_sde(eta, path, diffusion)
    x = sample(KEY, b, x=x1, times=times, schedule=FLOW, solver=solver)
    t = jnp.asarray(0.25)
    a, s, g = (float(v) for v in (path.schedule.alpha(t), path.schedule.sigma(t), path.gamma(t)[0]))
    variance = a**2 * V0 + s**2 * V1 + g**2
    assert float(x.mean()) == pytest.approx(a * M0 + s * M1, abs=0.02)
    assert float(x.var()) == pytest.approx(variance, rel=0.05)


def test_the_ode_carries_one_distribution_to_the_other():
    b, _ = networks(PATHS["straight_plain"])
    _, x1 = endpoints(N)
    x = sample(KEY, b, x=x1, times=jnp.linspace(1.0, 0.0, 33), solver=solvers.heun())
    assert float(x.mean()) == pytest.approx(M0, abs=4 * np.sqrt(V0 / N))
    assert float(x.var()) == pytest.approx(V0, rel=4 * np.sqrt(1 / N) + 2e-3)


def test_the_last_step_of_the_sde_is_the_mean_of_the_data():
    path = PATHS["bridge"]
    b, eta = networks(path)
    x = jnp.asarray([[0.3, -1.0]])
    solver = interpolant_sde(eta, path, 0.5)
    made = sample(KEY, b, x=x, times=jnp.asarray([0.4, 0.0]), solver=solver)
    np.testing.assert_allclose(made, means(path, x, jnp.asarray([0.4]))[2], rtol=1e-5)


NET = denoisers.network(lambda p, x, t, c, k: x, {}, FLOW, parameterization("v"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: interpolants.bridge(0.0), "bridge: scale=0.0 given; it must be positive"),
        (lambda: interpolants.straight(-1.0), "straight: scale=-1.0 given"),
        (lambda: interpolants.target(1.0), "target: scale=1.0 given"),
        (
            lambda: losses.conditional_flow(KEY, NET, jnp.ones(2), path=interpolants.straight()),
            "conditional_flow: the network predicts 'v'; 'velocity' is needed",
        ),
        (
            lambda: losses.latent_noise(
                KEY, networks(None)[1], jnp.ones(2), path=interpolants.straight()
            ),
            "path has no latent noise",
        ),
        (
            lambda: interpolant_sde(NET, interpolants.straight(), 1.0),
            "path has no latent noise",
        ),
        (
            lambda: interpolant_sde(NET, interpolants.bridge(), -1.0),
            "diffusion=-1.0 given",
        ),
    ],
)
def test_a_path_that_cannot_serve_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()
