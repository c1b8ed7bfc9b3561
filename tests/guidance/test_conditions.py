"""Several conditions of one network: nested scales, negatives, terms, fixed entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import same

from jdiff import UserError, denoisers, guidance, schedules
from jdiff.predictions import from_x0

EDM = schedules.edm()
X = jax.random.normal(jax.random.key(0), (3, 2))
T = jnp.asarray([0.4, 1.0, 3.0])
NULL = {"image": 0.0, "text": 0}
COND = {"image": jnp.asarray([[1.0], [2.0], [3.0]]), "text": jnp.asarray([1, 2, 3])}
CALLS = []
_call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))


def value(image, text):
    """A network whose two conditions interact, so that the order of nesting matters."""
    return 1.0 + image + 10.0 * text + 100.0 * image * text


def _network(x, t, cond):
    CALLS.append((len(x), sorted(cond)))
    made = value(cond["image"], cond["text"][:, None]) + 0 * x
    return from_x0(EDM, x, made, t)._replace(variance=made)


NETWORK = denoisers.function(_network, EDM)
I, TEXT = np.arange(1.0, 4.0), np.arange(1.0, 4.0)


def test_nested_scales_are_instructpix2pix_equation_3():
    s_i, s_t = 1.5, 7.5
    guided = guidance.nested(NETWORK, {"image": s_i, "text": s_t}, NULL)
    made = _call(guided, X, T, COND)
    wanted = (
        value(0, 0)
        + s_i * (value(I, 0) - value(0, 0))
        + s_t * (value(I, TEXT) - value(I, 0))
    )  # fmt: skip
    np.testing.assert_allclose(made.x0[:, 0], wanted, rtol=1e-5)
    np.testing.assert_allclose(X, made.x0 + T[:, None] * made.eps, rtol=1e-3, atol=4e-3)
    np.testing.assert_allclose(made.variance[:, 0], value(I, TEXT))  # the full condition's
    other = _call(guidance.nested(NETWORK, {"text": s_t, "image": s_i}, NULL), X, T, COND)
    assert np.abs(other.x0[:, 0] - wanted).max() > 1


def test_equal_nested_scales_are_guidance_with_all_conditions_at_once():
    both = _call(guidance.nested(NETWORK, {"image": 3.0, "text": 3.0}, NULL), X, T, COND)
    together = _call(guidance.nested(NETWORK, {("text", "image"): 3.0}, NULL), X, T, COND)
    same(both, _call(guidance.cfg(NETWORK, 3.0, NULL), X, T, COND), 1e-4, 1e-2)
    same(together, _call(guidance.cfg(NETWORK, 3.0, NULL), X, T, COND), 1e-4, 1e-2)


def test_a_condition_at_scale_1_is_simply_given():
    """s_I = 1: e(I, 0) + s_T (e(I, T) - e(I, 0)), which is cfg on the text alone."""
    made = _call(guidance.nested(NETWORK, {"image": 1.0, "text": 4.0}, NULL), X, T, COND)
    same(made, _call(guidance.cfg(NETWORK, 4.0, {"text": 0}), X, T, COND), 1e-4, 1e-2)


def test_nested_scales_of_any_kind_in_one_joint_call():
    scales = {"image": guidance.per_sample("s"), "text": guidance.scales.interval(5.0, -1.0, 1.0)}
    guided = guidance.nested(NETWORK, scales, NULL)
    CALLS.clear()
    made = guided(X, T, {**COND, "s": jnp.asarray([1.0, 2.0, 3.0])}).x0[:, 0]
    assert CALLS == [(9, ["image", "text"])]
    s_i, s_t = np.array([1, 2, 3.0]), np.array([1, 5, 1.0])
    base, image = value(0, 0), value(I, 0)
    np.testing.assert_allclose(
        made, base + s_i * (image - base) + s_t * (value(I, TEXT) - image), rtol=1e-5
    )


def test_a_negative_condition_in_place_of_the_null_for_each_sample():
    """cond["neg"] is chunked with the samples and is not shown to the network."""
    guided = guidance.cfg(NETWORK, 3.0, {"text": guidance.per_sample("neg")})
    CALLS.clear()
    made = guided(X, T, {**COND, "neg": jnp.asarray([5, 6, 7])}).x0[:, 0]
    assert CALLS == [(6, ["image", "text"])]
    bad = value(I, np.array([5, 6, 7]))
    np.testing.assert_allclose(made, bad + 3 * (value(I, TEXT) - bad), rtol=1e-5)


def test_several_negatives_each_push_with_their_weight():
    guided = guidance.negative(
        NETWORK, 3.0, NULL, [{"text": 5}, {"text": 6, "image": 0.0}], [0.5, 2]
    )
    CALLS.clear()
    made = guided(X, T, COND)
    assert CALLS == [(12, ["image", "text"])]
    null = value(0, 0)
    wanted = null + 3 * (value(I, TEXT) - null)
    wanted = wanted - 0.5 * (value(I, 5) - null) - 2 * (value(0, 6) - null)
    np.testing.assert_allclose(made.x0[:, 0], wanted, rtol=1e-5)
    np.testing.assert_allclose(made.variance[:, 0], value(I, TEXT))
    none = guidance.negative(NETWORK, 3.0, NULL, [], [])
    same(_call(none, X, T, COND), _call(guidance.cfg(NETWORK, 3.0, NULL), X, T, COND), 1e-4, 1e-2)


def test_equal_terms_whose_weights_sum_to_w_are_guidance_at_w():
    guided = guidance.composed(NETWORK, [1.5, 2.5], [{}, {}], NULL)
    same(_call(guided, X, T, COND), _call(guidance.cfg(NETWORK, 4.0, NULL), X, T, COND), 1e-4, 1e-2)


def test_fixed_entries_hold_whatever_is_given_and_serve_who_gives_nothing():
    held = guidance.fixed(NETWORK, {"text": 7, "image": jnp.asarray([0.5])})
    for cond in (COND, None):
        np.testing.assert_allclose(held(X, T, cond).x0[:, 0], value(0.5, 7), rtol=1e-6)
    only = guidance.fixed(NETWORK, {"text": 7})(X, T, {"image": COND["image"]})
    np.testing.assert_allclose(only.x0[:, 0], value(I, 7))


def test_guidance_around_guidance_keeps_each_samples_own_scale():
    """The outer joint call makes three samples six; the inner scale in cond follows them."""
    inner = guidance.cfg(NETWORK, guidance.per_sample("w"), {"image": 0.0})
    outer = guidance.cfg(inner, 2.0, {"text": 0})
    w = np.array([0.0, 1.0, 4.0])
    made = outer(X, T, {**COND, "w": jnp.asarray(w)}).x0[:, 0]
    e = lambda text: value(0, text) + w * (value(I, text) - value(0, text))
    np.testing.assert_allclose(made, e(0) + 2 * (e(TEXT) - e(0)), rtol=1e-5)
    with pytest.raises(UserError, match=r"scale of shape \(3,\) for a batch of 6: .*per_sample"):
        guidance.cfg(guidance.cfg(NETWORK, jnp.ones(3), {"image": 0.0}), 2.0, {"text": 0})(
            X, T, COND
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: guidance.nested(NETWORK, {}, {}), r"nested: scales name \[\]"),
        (lambda: guidance.nested(NETWORK, {"txt": 1.0}, NULL), r"null 'txt' .* mean 'text'"),
        (lambda: guidance.nested(NETWORK, {"text": 1.0}, NULL), r"scales 'image' is not known"),
        (
            lambda: guidance.nested(NETWORK, {"text": 1.0, ("text", "image"): 2.0}, NULL),
            r"nested: scales name .* every entry once",
        ),
        (lambda: guidance.composed(NETWORK, [1.0], [], NULL), r"composed: 1 weights for 0 terms"),
        (lambda: guidance.negative(NETWORK, 2.0, NULL, [{}], []), r"negative: 0 weights for 1"),
    ],
)  # fmt: skip
def test_conditions_that_cannot_be_composed_are_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
