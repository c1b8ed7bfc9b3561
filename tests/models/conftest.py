"""Shared by the tests of the networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def randomise():
    """Add noise to every weight: zero-initialised layers would hide what lies behind them."""

    def add_noise(params, seed=0, std=0.1):
        random = np.random.default_rng(seed)  # on the host: nothing to compile
        return jax.tree.map(
            lambda w: jnp.asarray(w + std * random.standard_normal(w.shape), w.dtype), params
        )

    return add_noise


@pytest.fixture
def all_gradients_live():
    """Assert that each leaf of a gradient is finite and not all zero."""

    def check(grads):
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            name = jax.tree_util.keystr(path)
            assert np.isfinite(g).all(), name
            assert np.abs(g).max() > 0, name

    return check
