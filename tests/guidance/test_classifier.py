"""Classifier guidance with the exact classifier of a mixture: Bayes' rule holds at scale 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, inside, mixture_1d, mixture_score, same

from jdiff import UserError, denoisers, guidance, schedules
from jdiff.guidance import scales
from jdiff.predictions import Prediction, corrupt

EDM = schedules.edm()
_call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))


def bayes(mixture):
    """log p(label | x_t) + const = log p(x_t | label) - log p(x_t)."""
    return lambda x, t, cond: mixture.log_density(x, t, cond) - mixture.log_density(x, t)


@pytest.mark.parametrize("name", ["edm", "cosine"])
def test_the_exact_classifier_makes_the_unconditional_denoiser_conditional(name):
    schedule = SCHEDULES[name]()
    mixture, _ = mixture_1d(schedule, labels=True)
    unconditional = guidance.fixed(mixture, {"label": 2})
    t = inside(schedule, 6)
    x = (
        schedule.alpha(t)[:, None] * jnp.linspace(-1.0, 1.5, 6)[:, None]
        + schedule.sigma(t)[:, None]
    )
    cond = {"label": jnp.asarray([0, 1, 0, 1, 0, 1])}
    made = _call(guidance.classifier(unconditional, bayes(mixture)), x, t, cond)
    same(made, _call(mixture, x, t, cond), 1e-3, 1e-4)
    assert np.abs(made.eps - _call(unconditional, x, t, cond).eps).max() > 0.1


def test_other_scales_are_classifier_free_guidances():
    mixture, numbers = mixture_1d(EDM, labels=True)
    unconditional = guidance.fixed(mixture, {"label": 2})
    x, t = jnp.asarray([[0.3], [-1.4], [2.0]]), jnp.asarray([0.4, 1.0, 3.0])
    cond = {"label": jnp.asarray([0, 1, 0]), "w": jnp.asarray([0.0, 2.5, -1.0])}
    guided = guidance.classifier(unconditional, bayes(mixture), guidance.per_sample("w"))
    made = _call(guided, x, t, cond)
    free = guidance.cfg(mixture, guidance.per_sample("w"), {"label": 2})
    same(made, _call(free, x, t, cond), 1e-3, 1e-4)
    for i, (label, w) in enumerate(zip([0, 1, 0], [0.0, 2.5, -1.0])):
        null = mixture_score(x[i], t[i], numbers)
        score = null + w * (mixture_score(x[i], t[i], numbers, label) - null)
        np.testing.assert_allclose(made.eps[i], -t[i] * score, rtol=1e-3, atol=1e-4)


def test_trees_leaf_by_leaf_consistent_with_x_and_nothing_where_alpha_is_0():
    """log p = -(|a|^2 + |b|^2) / 2 has the gradient -x."""
    flow = schedules.rectified_flow()
    x = {"a": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.asarray([-1.0, 5.0])}
    t = jnp.asarray([1.0, 0.5])
    inner = denoisers.function(lambda x, t, cond: Prediction(x, x, {"kept": t}), flow)
    log_prob = lambda x, t, cond: -0.5 * (jnp.sum(x["a"] ** 2, 1) + x["b"] ** 2)
    made = guidance.classifier(inner, log_prob, 2.0)(x, t)
    np.testing.assert_allclose(made.eps["a"], x["a"] * (1 + 2 * t[:, None]))
    np.testing.assert_allclose(made.x0["b"], [-1.0, 5.0 - 2 * 0.25 / 0.5 * 5.0])
    np.testing.assert_allclose(made.variance["kept"], t)
    mixed = corrupt(flow, made.x0, made.eps, t)
    np.testing.assert_allclose(mixed["a"][1], x["a"][1], rtol=1e-6)


def test_a_classifiers_weights_are_leaves():
    def apply(params, x, t, cond):
        return params["w"] * x[:, 0]

    def guided(w):
        log_prob = jax.tree_util.Partial(apply, {"w": w})
        inner = denoisers.function(lambda x, t, cond: Prediction(x, x), EDM)
        return guidance.classifier(inner, log_prob, scales.linear(2.0, 2.0))

    x, t = jnp.ones((1, 1)), jnp.asarray([3.0])
    made = jax.jit(jax.vmap(lambda w: guided(w)(x, t).eps[0, 0]))(jnp.asarray([1.0, 10.0]))
    np.testing.assert_allclose(made, 1 - 2 * 3 * np.array([1.0, 10.0]))


def test_a_classifier_without_a_schedule_is_refused():
    with pytest.raises(UserError, match="classifier: .* no schedule"):
        guidance.classifier(lambda *_: 0, lambda *_: 0)
