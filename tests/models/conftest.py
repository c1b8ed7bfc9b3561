"""Shared by the tests of the networks."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def randomise():
    """Add noise to every weight: zero-initialised layers would hide what lies behind them."""

    def add_noise(params, seed=0, std=0.1):
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noisy = [w + std * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys)]
        return structure.unflatten(noisy)

    return add_noise


@pytest.fixture
def all_gradients_live():
    """Assert that each leaf of a gradient is finite and not all zero."""

    def check(grads):
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            name = jax.tree_util.keystr(path)
            assert jnp.isfinite(g).all(), name
            assert jnp.abs(g).max() > 0, name

    return check
