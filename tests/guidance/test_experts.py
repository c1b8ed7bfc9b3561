"""Several models: autoguidance, products and mixtures, on Gaussians where all is in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import SCHEDULES, inside, mixture_1d, mixture_score, same

from jdiff import UserError, denoisers, grids, guidance, sample, schedules, solvers
from jdiff.predictions import Prediction, from_x0

EDM, FLOW = schedules.edm(), schedules.rectified_flow()
X = jnp.asarray([[0.3], [-1.4], [2.0]])
T = jnp.asarray([0.4, 1.0, 3.0])
_call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))
M, V = np.array([0.5, -1.0]), np.array([0.3, 1.2])


def gaussian(mean, variance, schedule=EDM):
    return denoisers.mixture(jnp.full((1, 1), mean, jnp.float32), variance, schedule)


def marginal(schedule, t, mean, variance):
    """(mean, variance) of x_t, in numpy float64."""
    a, s = (np.asarray(f(t), np.float64)[:, None] for f in (schedule.alpha, schedule.sigma))
    return a * mean, a**2 * variance + s**2


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_autoguidance_of_gaussians_is_a_gaussian_at_every_level(w):
    """p_good^w p_bad^(1 - w): precisions and means over variances extrapolate."""
    good, bad = (gaussian(m, v) for m, v in zip(M, V))
    made = _call(guidance.autoguidance(good, bad, w), X, T, {})
    (m1, v1), (m0, v0) = (marginal(EDM, T, m, v) for m, v in zip(M, V))
    precision = w / v1 + (1 - w) / v0
    mean = (w * m1 / v1 + (1 - w) * m0 / v0) / precision
    sigma = np.asarray(T)[:, None]
    np.testing.assert_allclose(made.eps, sigma * precision * (X - mean), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.x0, X - sigma * made.eps, rtol=1e-4, atol=1e-5)


def test_guided_samples_of_equal_variances_are_the_tilted_gaussian():
    """With one variance v, guidance shifts the mean to m0 + w (m1 - m0) and does sample p(x)
    p(c | x)^w; the probability-flow map is x -> m + (x - m) sqrt(v / (v + sigma^2))."""
    w, v, start = 3.0, 0.25, 10.0
    guided = guidance.autoguidance(gaussian(0.5, v), gaussian(-1.0, v), w)
    x = jnp.asarray([[-10.0], [3.0], [12.0]])
    times = jnp.append(jnp.geomspace(start, 1e-3, 65), 0.0)
    made = sample(jax.random.key(0), guided, x=x, times=times, solver=solvers.heun())
    mean = -1.0 + w * 1.5
    wanted = mean + (x - mean) * np.sqrt(v / (v + start**2))
    np.testing.assert_allclose(made, wanted, rtol=2e-3, atol=2e-3)


def test_a_bad_model_may_drop_the_condition_and_is_then_classifier_free_guidance():
    mixture, _ = mixture_1d(EDM, labels=True)
    cond = {"label": jnp.asarray([0, 1, 0]), "w": jnp.asarray([0.0, 2.0, 5.0])}
    w = guidance.per_sample("w")
    free = _call(guidance.cfg(mixture, w, {"label": 2}), X, T, cond)
    bad = guidance.fixed(mixture, {"label": 2})
    same(_call(guidance.autoguidance(mixture, bad, w), X, T, cond), free, 1e-4, 1e-4)
    refined = _call(guidance.rescale(guidance.autoguidance(mixture, bad, w), 0.0), X, T, cond)
    same(refined, free, 1e-4, 1e-4)


@pytest.mark.parametrize("base", [None, (0.2, 2.0)])
@pytest.mark.parametrize("name", ["edm", "cosine"])
def test_a_product_of_gaussians_has_the_sum_of_their_precisions(name, base):
    """prod p_i^w_i, and p_base prod (p_i / p_base)^w_i; the second weight is a negation."""
    schedule, weights = SCHEDULES[name](), [1.5, -0.3]
    t = inside(schedule, 3)
    experts = [gaussian(m, v, schedule) for m, v in zip(M, V)]
    guided = guidance.product(experts, weights, base and gaussian(*base, schedule))
    made = _call(guided, X, t, {})
    terms = [(w, *marginal(schedule, t, m, v)) for w, m, v in zip(weights, M, V)]
    if base:
        terms.append((1 - sum(weights), *marginal(schedule, t, *base)))
    score = sum(-w * (np.asarray(X) - m) / v for w, m, v in terms)
    alpha, sigma = (np.asarray(f(t))[:, None] for f in (schedule.alpha, schedule.sigma))
    np.testing.assert_allclose(made.eps, -sigma * score, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alpha * made.x0 + sigma * made.eps, X, rtol=1e-3, atol=1e-3)


def test_equal_experts_whose_weights_sum_to_one_are_the_model():
    """At pure noise too, where alpha = 0."""
    model, _ = mixture_1d(FLOW)
    t = jnp.asarray([1.0, 0.5, 0.2])
    wanted = _call(model, X, t, {})
    same(_call(guidance.product([model] * 3, [0.5, 0.7, -0.2]), X, t, {}), wanted, 1e-3, 1e-3)
    same(_call(guidance.product([model], [3.0], model), X, t, {}), wanted, 1e-3, 1e-3)
    same(_call(guidance.union([model] * 2, [1.0, 3.0]), X, t, {}), wanted, 1e-4, 1e-4)


def test_a_product_of_labels_over_the_whole_is_guidance_of_both():
    """Composable diffusion's AND on one network: the same as its joint call."""
    mixture, _ = mixture_1d(EDM, labels=True)
    only = lambda label: guidance.fixed(mixture, {"label": label})
    apart = guidance.product([only(0), only(1)], [2.0, 1.5], only(2))
    joint = guidance.composed(mixture, [2.0, 1.5], [{"label": 0}, {"label": 1}], {"label": 2})
    cond = {"label": jnp.zeros(3, jnp.int32)}
    same(_call(apart, X, T, {}), _call(joint, X, T, cond), 1e-4, 1e-4)


def test_a_mixture_of_two_mixtures_is_the_mixture_of_all_their_components():
    schedule = SCHEDULES["cosine"]()
    t = inside(schedule, 3)
    means, variances = np.array([-1.0, 0.3, 1.2]), np.array([0.05, 0.02, 0.1])
    weights = np.array([0.2, 0.5, 0.3])
    part = lambda k: denoisers.mixture(
        jnp.asarray(means[k])[:, None], variances[k], schedule, weights=weights[k]
    )
    one, two = np.array([0, 2]), np.array([1])
    guided = guidance.union([part(one), part(two)], [0.25, 0.25])
    whole, _ = mixture_1d(schedule)
    same(_call(guided, X, t, {}), _call(whole, X, t, {}), 1e-3, 1e-4)
    log = jax.jit(lambda d: d.log_density(X, t))
    np.testing.assert_allclose(log(guided), log(whole), rtol=1e-4, atol=1e-4)


def test_a_mixture_takes_log_densities_of_models_that_have_none():
    mixture, numbers = mixture_1d(EDM, labels=True)
    plain = [denoisers.function(lambda x, t, c, k=k: mixture(x, t, {"label": k}), EDM)
             for k in (jnp.full(3, 0), jnp.full(3, 1))]  # fmt: skip
    logs = [lambda x, t, c, k=k: mixture.log_density(x, t, {"label": jnp.full(3, k)})
            for k in (0, 1)]  # fmt: skip
    made = jax.jit(lambda x, t: guidance.union(plain, [0.5, 0.5], logs)(x, t).eps)(X, T)
    # labels 0 (components 0 and 2) and 1 weigh 0.5 each: the whole mixture
    for i in range(3):
        wanted = -T[i] * mixture_score(X[i], T[i], numbers)
        np.testing.assert_allclose(made[i], wanted, rtol=1e-3, atol=1e-4)


def test_the_first_experts_variance_is_kept_and_trees_are_composed_by_leaf():
    def expert(level):
        def denoise(x, t, cond):
            x0 = {"a": level + 0 * x["a"], "b": 2 * level + 0 * x["b"]}
            return from_x0(EDM, x, x0, t)._replace(variance=level)

        return denoisers.function(denoise, EDM)

    x = {"a": X, "b": X[:, 0]}
    made = guidance.product([expert(1.0), expert(3.0)], [2.0, 0.5], expert(5.0))(x, T)
    np.testing.assert_allclose(made.x0["a"], 2 * 1 + 0.5 * 3 - 1.5 * 5 + 0 * X)
    np.testing.assert_allclose(made.x0["b"], 2 * made.x0["a"][:, 0])
    assert made.variance == 1.0
    good = guidance.autoguidance(expert(1.0), expert(3.0), 2.0)(x, T)
    np.testing.assert_allclose(good.x0["a"], -1 + 0 * X)
    assert good.variance == 1.0


def test_new_weights_do_not_recompile():
    draw = lambda w: sample(
        jax.random.key(0), guidance.product([gaussian(0.0, 1.0), gaussian(1.0, 2.0)], [w, 1 - w]),
        shape=(1,), times=grids.karras(EDM, 2),
    )  # fmt: skip
    from jdiff import sampling

    draw(0.5)
    before = sampling._run._cache_size()
    assert float(draw(0.9)[0, 0]) != float(draw(0.5)[0, 0])
    assert sampling._run._cache_size() == before


OTHER = denoisers.function(lambda x, t, c: Prediction({"a": x[:, :1]}, {"a": x[:, :1]}), EDM)
WIDE = denoisers.function(lambda x, t, c: Prediction(x[:, None], x[:, None]), EDM)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: guidance.autoguidance(gaussian(0.0, 1.0), gaussian(0.0, 1.0, FLOW), 2.0),
            r"autoguidance: bad: it is on the schedule RectifiedFlow",
        ),
        (
            lambda: guidance.autoguidance(gaussian(0.0, 1.0), gaussian(0.0, 1.0, schedules.edm(
                0.1)), 2.0),
            r"autoguidance: bad: it is on the schedule EDM\(sigma_min=0.1",
        ),
        (
            lambda: guidance.autoguidance(gaussian(0.0, 1.0), OTHER, 2.0)(X, T),
            r"the trees do not match: the bad prediction has the array of shape none, \(3, 1\)",
        ),
        (
            lambda: guidance.product([gaussian(0.0, 1.0), WIDE], [1.0, 0.0])(X, T),
            r"prediction 1 has the array of shape \(3, 1, 1\), \(3, 1\) is needed",
        ),
        (lambda: guidance.product([OTHER], [1.0, 2.0]), r"product: 2 weights for 1 experts"),
        (
            lambda: guidance.product([gaussian(0.0, 1.0, FLOW)] * 2, [1.0, 1.0]),
            r"product: alpha = 0 at t_max of RectifiedFlow; give base=",
        ),
        (lambda: guidance.product([lambda *_: 0] * 2, [1.0, 1.0]), r"product: .* no schedule"),
        (lambda: guidance.union([OTHER], [1.0]), r"union: expert 0 .* has no log_density"),
        (lambda: guidance.union([gaussian(0.0, 1.0)], [-1.0]), r"union: weights=\[-1.0\] given"),
        (lambda: guidance.union([OTHER], [1.0], []), r"union: 0 log_densities for 1 experts"),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_composed_are_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
