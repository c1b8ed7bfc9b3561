"""Thresholding against numpy: per sample, consistent with x, nothing where nothing is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import same

from jdiff import UserError, denoisers, guidance, schedules
from jdiff.predictions import corrupt, from_x0

EDM = schedules.edm()
RAW = (
    jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    * jnp.asarray([3.0, 0.2, 1.0])[:, None, None, None]
)  # noqa: E501
X = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
T = jnp.asarray([0.5, 1.0, 2.0])
DENOISE = denoisers.function(lambda x, t, cond: from_x0(EDM, x, RAW, t), EDM)


@pytest.mark.parametrize("limit", [1.0, 0.4])
def test_static_thresholding_clips_x0(limit):
    made = guidance.static_threshold(DENOISE, limit)(X, T)
    np.testing.assert_allclose(made.x0, np.clip(RAW, -limit, limit), rtol=1e-6)


@pytest.mark.parametrize("quantile", [0.9, 0.995, 1.0])
@pytest.mark.parametrize("limit", [1.0, 0.4])
def test_dynamic_thresholding_is_imagens_for_each_sample_alone(quantile, limit):
    made = guidance.dynamic_threshold(DENOISE, quantile, limit)(X, T)
    for raw, x0 in zip(np.asarray(RAW), made.x0):
        s = max(np.quantile(np.abs(raw), quantile), limit)
        np.testing.assert_allclose(x0, np.clip(raw, -s, s) / s * limit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [guidance.static_threshold, guidance.dynamic_threshold])
def test_an_image_inside_its_range_is_left_alone_and_the_rest_agree_with_x(make):
    """Clipped x0 with the old eps would leave the path: eps is recomputed (pitfall 18)."""
    made = make(DENOISE)(X, T)
    np.testing.assert_array_equal(made.x0[1], RAW[1])
    assert (np.asarray(made.x0[0]) != np.asarray(RAW[0])).any()
    np.testing.assert_allclose(corrupt(EDM, made.x0, made.eps, T), X, rtol=1e-5, atol=1e-5)


def test_each_leaf_of_a_tree_has_its_own_quantile():
    tree = {"a": RAW, "b": 10 * RAW[..., 0]}
    x = {"a": X, "b": X[..., 0]}
    joint = denoisers.function(lambda x, t, cond: from_x0(EDM, x, tree, t), EDM)
    made = guidance.dynamic_threshold(joint)(x, T).x0
    same(made["a"], guidance.dynamic_threshold(DENOISE)(X, T).x0)
    assert float(jnp.abs(made["b"]).max()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: guidance.dynamic_threshold(DENOISE, 1.5), r"quantile=1.5 given; .* \(0, 1\]"),
        (lambda: guidance.dynamic_threshold(lambda *_: 0), r"dynamic_threshold: .* no schedule"),
        (lambda: guidance.static_threshold(lambda *_: 0), r"static_threshold: .* no schedule"),
    ],
)
def test_a_threshold_that_cannot_work_is_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
