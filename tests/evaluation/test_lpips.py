"""LPIPS: what holds for any weights; tests/parity/evaluation/test_lpips.py has the network's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.evaluation import lpips


@pytest.fixture(scope="module")
def measured():
    """(distance of pairs of 16 x 16 images and the gradient by the first, jitted)."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(
            rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1]))
        )

    params = jax.tree.map(draw, lpips.shapes())
    for k in range(5):
        params[f"lin{k}"] = jnp.abs(params[f"lin{k}"])

    def both(images, truth):
        values, back = jax.vjp(lambda images: lpips.distance(params, images, truth), images)
        return values, back(jnp.ones(2))[0]

    return jax.jit(both)


def test_images_are_no_distance_from_themselves_and_each_pair_is_alone(measured):
    a, b = np.random.default_rng(1).uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)
    near, _ = measured(np.stack([a[0], a[1]]), np.stack([a[0], b[1]]))
    assert near[0] < 1e-10 < near[1]  # the two are computed apart
    there, back = measured(a, b)[0], measured(b, a)[0]
    np.testing.assert_allclose(there, back, rtol=1e-5)  # a distance is symmetric
    np.testing.assert_allclose(there[1], near[1], rtol=1e-5)


def test_the_gradient_is_finite_where_nothing_is_seen(measured):
    """Images of one colour have features of 0 in some places, and equal ones have no gradient."""
    flat = np.stack([np.full((16, 16, 3), value, np.float32) for value in (-0.03, 1.0)])
    values, gradient = measured(flat, flat)
    assert (np.asarray(values) < 1e-10).all() and np.isfinite(gradient).all()
    _, gradient = measured(flat, flat[::-1])
    assert np.isfinite(gradient).all()


def test_features_of_zero_have_a_unit_of_zero_without_a_gradient():
    x = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(lpips._unit(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: lpips._unit(x)[0].sum())(x), 0.0)


def test_images_that_do_not_compare_are_refused():
    with pytest.raises(UserError, match="takes 16 x 16 or more"):
        lpips.distance({}, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(UserError, match="both have to be"):
        lpips.distance({}, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 1)))


def test_weights_that_are_not_prepared_say_the_command(tmp_path):
    with pytest.raises(UserError, match="jdiff prepare lpips"):
        lpips.load(tmp_path / "none.safetensors")
