"""Conditions and their null, for guidance and for the dropping of conditions in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import UserError, conditioning

N = 4000
COND = {"label": jnp.arange(N) % 10, "text": jnp.ones((N, 2, 3)), "low": jnp.ones((N, 4))}
NULL = {"label": 10, "text": jnp.full((2, 3), -5.0)}
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_sample_is_dropped_with_the_given_rate(rate):
    dropped = np.asarray(conditioning.drop(KEY, COND, NULL, rate)["label"] == 10)
    error = 4 * np.sqrt(rate * (1 - rate) / N)
    assert dropped.mean() == pytest.approx(rate, abs=error)
    # sample by sample: neighbours are independent
    assert abs(np.corrcoef(dropped[1:], dropped[:-1])[0, 1]) < 4 / np.sqrt(N)


def test_all_named_entries_are_dropped_together_and_the_rest_is_kept():
    made = conditioning.drop(KEY, COND, NULL, 0.3)
    dropped = np.asarray(made["label"] == 10)
    assert 0 < dropped.sum() < N
    np.testing.assert_array_equal(
        made["text"], np.where(dropped[:, None, None], -5.0, COND["text"])
    )
    np.testing.assert_array_equal(made["label"][~dropped], COND["label"][~dropped])
    np.testing.assert_array_equal(made["low"], COND["low"])


def test_rates_0_and_1_drop_nothing_and_everything():
    kept, gone = (conditioning.drop(KEY, COND, NULL, rate) for rate in (0.0, 1.0))
    np.testing.assert_array_equal(kept["label"], COND["label"])
    assert (gone["label"] == 10).all() and (gone["text"] == -5.0).all()


def test_another_key_drops_other_samples():
    one, other = (conditioning.drop(jax.random.key(i), COND, NULL, 0.5)["label"] for i in (0, 1))
    assert (one != other).any()


def test_a_null_keeps_the_shape_and_dtype_of_what_it_replaces():
    made = conditioning.with_null(COND, NULL)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), COND
    )
    assert (made["label"] == 10).all() and (made["text"] == -5.0).all()


def test_a_nested_entry_has_a_nested_null():
    cond = {"text": {"tokens": jnp.ones((3, 4)), "mask": jnp.ones((3, 4), bool)}}
    made = conditioning.with_null(cond, {"text": {"tokens": jnp.zeros(4), "mask": False}})
    assert not made["text"]["tokens"].any() and not made["text"]["mask"].any()


@pytest.mark.parametrize(
    ("null", "said"),
    [
        ({"labels": 10}, "null entry 'labels' is not known. Did you mean 'label'"),
        ({"text": jnp.zeros(4)}, r"null\['text'\] of shape \(4,\) does not broadcast .*, 2, 3\)"),
        ({"label": jnp.zeros((2, 2))}, r"null\['label'\] of shape \(2, 2\)"),
    ],
)  # fmt: skip
def test_a_null_that_does_not_fit_is_refused_by_name(null, said):
    with pytest.raises(UserError, match=said):
        conditioning.with_null(COND, null)
