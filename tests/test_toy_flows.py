"""experiments/toy_flows.py: its metrics on known flows, its data, networks of the other time."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "toy_flows.py"
_SPEC = importlib.util.spec_from_file_location("toy_flows", _PATH)
toy_flows = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(toy_flows)

KEY = jax.random.key(0)
SMALL = toy_flows.Sizes(seeds=2, steps=40, batch=16, samples=64, grid=10)


def test_the_distance_of_a_moved_sample_is_the_move_and_takes_the_best_matching():
    x = np.random.default_rng(0).standard_normal((64, 2))
    moved = x[::-1] + [3.0, 4.0]
    assert toy_flows.wasserstein2(x, moved) == pytest.approx(5.0)


def test_a_constant_velocity_has_its_square_as_energy_and_the_move_as_samples():
    """One layer's bias is the whole flow: dx/dt = u from t = 1 to 0 moves by -u."""
    u = jnp.asarray([[1.0, 2.0], [0.5, -3.0]])
    params = [(jnp.zeros((2, 3, 2)), u)]
    x1 = jax.random.normal(KEY, (2, 64, 2))
    x, energy, paths = toy_flows.flow(params, x1, SMALL)
    np.testing.assert_allclose(x, x1 - u[:, None], atol=1e-5)
    np.testing.assert_allclose(energy, np.square(u).sum(1), rtol=1e-5)
    assert paths.shape == (2, 11, 64, 2)
    np.testing.assert_allclose(paths[:, 0], x1)
    np.testing.assert_allclose(paths[:, -1], x, atol=1e-6)


def test_a_network_of_the_other_time_is_turned_around():
    params = toy_flows.init(KEY)
    turned = toy_flows._backwards(params)
    x, t = jax.random.normal(KEY, (5, 2)), jnp.linspace(0.0, 1.0, 5)
    theirs = toy_flows.apply(params, x, 1.0 - t, {}, None)
    ours = toy_flows.apply(turned, x, t, {}, None)
    np.testing.assert_allclose(ours, -theirs, atol=1e-5)


@pytest.mark.parametrize("law", [toy_flows.gaussians, toy_flows.moons, toy_flows.scurve])
def test_the_distributions_are_those_of_their_definitions(law):
    """Means and variances by hand, to four standard errors of 20,000 draws."""
    x, n = np.asarray(law(KEY, 20_000), float), 20_000
    known = {
        toy_flows.gaussians: ([0, 0], [12.5 + 0.1**0.5] * 2),
        # x: 3 (cos or 1 - cos + noise) - 1; the two halves' means are 0 and 1, their variance 1/2.
        toy_flows.moons: ([0.5, -0.25], [9 * (0.75 + 0.04), None]),
        toy_flows.scurve: ([0, 0], [4 * (0.5 + 0.01), None]),
    }
    mean, variance = known[law]
    np.testing.assert_allclose(x.mean(0), mean, atol=4 * x.std() / np.sqrt(n))
    for made, expected in zip(x.var(0), variance):
        if expected is not None:
            assert made == pytest.approx(expected, rel=4 * np.sqrt(2 / n))


def test_seeds_train_at_once_and_apart_and_training_helps():
    keys = jax.random.split(KEY, 2)
    path, coupling = toy_flows.METHODS["OT-CFM"]
    draw = lambda law, seed: law(jax.random.key(seed), 2 * 40 * 16).reshape(2, 40, 16, 2)
    x0, x1 = draw(toy_flows.moons, 1), draw(toy_flows.normal, 2)
    both = toy_flows.train(keys, path, coupling, x0, x1)
    turned = toy_flows.train(keys[::-1], path, coupling, x0[::-1], x1[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[::-1], atol=1e-5), both, turned)
    x1 = jax.random.normal(KEY, (2, 64, 2))
    truth = jax.vmap(lambda k: toy_flows.moons(k, 64))(keys)
    before = jax.vmap(toy_flows.init)(keys)
    distance = lambda params: np.mean([
        toy_flows.wasserstein2(a, b) for a, b in zip(toy_flows.flow(params, x1, SMALL)[0], truth)
    ])  # fmt: skip
    assert distance(both) < 0.7 * distance(before)
