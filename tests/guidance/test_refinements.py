"""What refines a guidance that extrapolates: identities, invariances, formulas in numpy, order.

The parity tests hold the same refinements against diffusers' on random images.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import same

from jdiff import UserError, denoisers, grids, guidance, sample, schedules, solvers
from jdiff.guidance.base import from_target, to_target
from jdiff.noise import fresh
from jdiff.predictions import Prediction, corrupt, endpoint_velocity, from_x0

EDM, FLOW, COSINE = schedules.edm(), schedules.rectified_flow(), schedules.cosine()
NULL = {"label": 2}
KEYS = jax.random.split(jax.random.key(0), 3)
X, GOOD, BAD = (jax.random.normal(k, (3, 6, 4, 2)) for k in KEYS)
GOOD = GOOD * jnp.asarray([1.0, 0.5, 2.0])[:, None, None, None] + 0.3
T = jnp.asarray([0.3, 0.5, 0.9])
COND = {"label": jnp.asarray([0, 1, 0])}
VARIANCE = jnp.arange(3.0)[:, None, None, None] + jnp.zeros_like(X)
_call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))

REFINEMENTS = {
    "apg": lambda d: guidance.apg(d, 0.2, 3.0),
    "cfg_zero": guidance.cfg_zero,
    "frequency": lambda d: guidance.frequency(d, 0.4),
    "magnitude": lambda d: guidance.magnitude(d, 0.5),
    "rescale": lambda d: guidance.rescale(d, 0.7),
    "rescale_v": lambda d: guidance.rescale(d, 0.7, "v"),
    "tangential": guidance.tangential,
}
NEUTRAL = {
    "apg": lambda d: guidance.apg(d, 1.0),
    "frequency": lambda d: guidance.frequency(d, 1.0),
    "magnitude": lambda d: guidance.magnitude(d, 0.0),
    "rescale": lambda d: guidance.rescale(d, 0.0),
}
every_refinement = pytest.mark.parametrize("name", REFINEMENTS)


def network(schedule, good=GOOD, bad=BAD, dtype=jnp.float32):
    """Predicts these images, and a variance that only the conditional call may pass on."""

    def denoise(x, t, cond):
        n = len(x) // len(good)
        null = (cond["label"] == 2)[:, None, None, None]
        x0 = jnp.where(null, *(jnp.repeat(a, n, 0) for a in (bad, good))).astype(dtype)
        variance = jnp.where(null, -1.0, jnp.repeat(VARIANCE[: len(good)], n, 0))
        return from_x0(schedule, x, x0, t)._replace(variance=variance)

    return denoisers.function(denoise, schedule)


NETWORKS = {"edm": network(EDM), "flow": network(FLOW)}
cfg = lambda w: guidance.cfg(NETWORKS["flow"], w, NULL)


@every_refinement
def test_scale_1_is_the_conditional_model_and_all_results_are_consistent_with_x(name):
    w = jnp.asarray([1.0, 4.0, -1.0])
    made = _call(REFINEMENTS[name](cfg(w)), X, T, COND)
    np.testing.assert_allclose(made.x0[0], GOOD[0], rtol=1e-4, atol=1e-4)
    plain = BAD + w[:, None, None, None] * (GOOD - BAD)
    assert np.abs(made.x0 - plain)[1].max() > 0.05  # it does something
    np.testing.assert_allclose(corrupt(FLOW, made.x0, made.eps, T), X, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(made.variance, VARIANCE)


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_refinement_is_classifier_free_guidance(name):
    made = _call(NEUTRAL[name](cfg(4.0)), X, T, COND)
    same(made, _call(cfg(4.0), X, T, COND), 1e-4, 1e-4)


@every_refinement
def test_pure_noise_gives_numbers(name):
    """alpha = 0, where eps says nothing of x0 and the noise-to-signal ratio is infinite."""
    made = _call(REFINEMENTS[name](cfg(4.0)), X, jnp.ones(3), COND)
    assert all(np.isfinite(a).all() for a in (made.x0, made.eps))
    np.testing.assert_allclose(made.eps, X, atol=1e-4)


@every_refinement
def test_a_sample_is_guided_as_it_is_alone_at_any_scale_and_in_one_program(name):
    scales = jnp.asarray([0.0, 2.0, 5.0])
    made = _call(REFINEMENTS[name](cfg(scales)), X, T, COND)
    one = lambda w: REFINEMENTS[name](cfg(w))(X, T, COND).x0
    swept = jax.jit(jax.vmap(one))(scales)
    for i in range(3):
        np.testing.assert_allclose(made.x0[i], swept[i, i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["apg", "magnitude", "rescale_v", "tangential"])
def test_trees_are_refined_leaf_by_leaf(name):
    """Two equal leaves are refined as one leaf is."""
    tree = lambda a: {"a": a, "b": (a,)}

    def double(x, t, cond):
        made = NETWORKS["flow"](x["a"], t, cond)
        return Prediction(*jax.tree.map(tree, (made.x0, made.eps)))

    guided = guidance.cfg(denoisers.function(double, FLOW), 4.0, NULL)
    made = _call(REFINEMENTS[name](guided), tree(X), T, COND)
    wanted = _call(REFINEMENTS[name](cfg(4.0)), X, T, COND)
    same(made.x0, tree(wanted.x0), 1e-4, 1e-4)


@pytest.mark.parametrize("name", ["apg", "magnitude"])
def test_gradients_pass_where_the_pair_is_one(name):
    """Guidance by a measurement differentiates the denoiser; |good - bad| has no slope at 0."""
    schedule = COSINE
    inner = denoisers.function(lambda x, t, cond: from_x0(schedule, x, jnp.tanh(x), t), schedule)
    guided = REFINEMENTS[name](guidance.cfg(inner, 4.0, NULL))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(guided(x, T, COND).x0)))(X)
    np.testing.assert_allclose(slope, 1 - jnp.tanh(X) ** 2, rtol=1e-3, atol=1e-3)


def test_low_precision_is_refined_in_float32():
    low = network(FLOW, dtype=jnp.bfloat16)
    every = guidance.rescale(
        guidance.tangential(guidance.apg(guidance.magnitude(guidance.cfg(low, 4.0, NULL)), 0.5))
    )
    assert _call(every, X.astype(jnp.bfloat16), T, COND).x0.dtype == jnp.float32


def flat(a):
    return np.asarray(a, np.float64).reshape(len(a), -1)


def test_apg_written_out_in_numpy():
    eta, norm, w = 0.3, 4.0, 5.0
    good, d = flat(GOOD), flat(GOOD) - flat(BAD)
    d = d * np.minimum(1.0, norm / np.linalg.norm(d, axis=1))[:, None]
    unit = good / np.linalg.norm(good, axis=1)[:, None]
    parallel = (d * unit).sum(1)[:, None] * unit
    wanted = good + (w - 1) * ((d - parallel) + eta * parallel)
    made = _call(guidance.apg(cfg(w), eta, norm), X, T, COND)
    np.testing.assert_allclose(flat(made.x0), wanted, rtol=1e-4, atol=1e-4)


def test_cfg_zero_scales_the_null_velocity_to_the_closest_point():
    """good - s* bad is orthogonal to bad: the definition of the best multiple."""
    v = lambda p: flat(endpoint_velocity(FLOW, p, T))
    good, bad = (_call(cfg(w), X, T, COND) for w in (1.0, 0.0))
    only_bad = v(_call(guidance.cfg_zero(cfg(0.0)), X, T, COND))
    np.testing.assert_allclose(((v(good) - only_bad) * v(bad)).sum(1), 0.0, atol=2e-3)
    made = v(_call(guidance.cfg_zero(cfg(4.0)), X, T, COND))
    np.testing.assert_allclose(made, only_bad + 4 * (v(good) - only_bad), rtol=1e-3, atol=1e-3)


def test_zero_init_stands_still_at_first_and_then_is_the_model():
    times = jnp.linspace(1.0, 0.0, 11)
    cond = {"label": jnp.zeros(3, jnp.int32)}
    guided = guidance.zero_init(cfg(4.0), (2 - 0.5) / 10)
    for solver in (solvers.euler(), solvers.ddim()):
        _, path = sample(
            KEYS[0], guided, x=X, cond=cond, times=times, solver=solver,
            observe=lambda x, t, prediction: x,
        )  # fmt: skip
        np.testing.assert_allclose(path[2], X, rtol=1e-5, atol=1e-5)
        assert np.abs(path[3] - X).max() > 0.1
    same(_call(guided, X, T * 0.9, COND), _call(cfg(4.0), X, T * 0.9, COND))


def test_tangential_takes_away_what_the_two_do_not_share():
    """Of two nearly equal predictions the shared direction is their mean: bad loses its own part.
    Where bad is a multiple of good, nothing is lost."""
    r = jax.random.split(jax.random.key(5), 2)
    mean = 10.0 * jax.random.normal(r[0], X.shape)
    bad, good = mean - 0.01 * GOOD, mean + 0.01 * GOOD
    guided = guidance.cfg(network(FLOW, good, bad), 0.0, NULL)
    made = flat(_call(guidance.tangential(guided, "x0"), X, T, COND).x0)
    rows = np.stack([flat(good), flat(bad)], 1)
    leading = np.linalg.svd(rows, full_matrices=False)[2][:, 0]
    wanted = (flat(bad) * leading).sum(1)[:, None] * leading
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)
    guided = guidance.cfg(network(FLOW, -3.0 * BAD, BAD), 0.0, NULL)
    made = _call(guidance.tangential(guided, "x0"), X, T, COND).x0
    np.testing.assert_allclose(made, BAD, rtol=1e-4, atol=1e-4)


def test_frequency_splits_a_constant_from_a_checkerboard():
    """A constant is all low band, a checkerboard all high; edges do not leak."""
    checker = jnp.asarray((-1.0) ** np.add.outer(np.arange(8), np.arange(8)))[None, :, :, None]
    images = jnp.concatenate([jnp.ones_like(checker), checker])
    guided = guidance.cfg(network(FLOW, images, jnp.zeros_like(images)), 5.0, NULL)
    cond, t = {"label": jnp.zeros(2, jnp.int32)}, jnp.full(2, 0.5)
    for octaves in (1, 2):
        made = _call(guidance.frequency(guided, 0.25, octaves), images, t, cond).x0
        np.testing.assert_allclose(made[0], 1 + 0.25 * 4, atol=1e-5)
        np.testing.assert_allclose(made[1], 5 * checker[0], atol=1e-5)


def test_cfg_pp_with_ddim_is_the_papers_algorithm_2():
    """Written out in numpy: x0 by the guided noise, renoised by the unconditional."""
    lam, n = 0.6, 6
    schedule = schedules.vp_linear()
    times = np.linspace(1.0, 0.05, n)

    def eps_of(x, label):  # any two noise predictors
        return np.tanh(x + 0.3) if label == 2 else np.tanh(0.5 * x) + 0.2

    def denoise(x, t, cond):
        null = (cond["label"] == 2)[:, None]
        eps = jnp.where(null, jnp.tanh(x + 0.3), jnp.tanh(0.5 * x) + 0.2)
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return Prediction((x - sigma * eps) / alpha, eps)

    x = np.array([[0.3, -1.2], [2.0, 0.1]])
    guided = guidance.cfg_pp(guidance.cfg(denoisers.function(denoise, schedule), lam, NULL))
    made = sample(
        KEYS[0], guided, x=jnp.asarray(x), cond={"label": jnp.asarray([0, 1])},
        times=jnp.asarray(times), solver=solvers.ddim(),
    )  # fmt: skip
    abar = np.exp(-(0.1 * times + 0.5 * 19.9 * times**2))
    for now, then in zip(abar[:-1], abar[1:]):
        e_c, e_null = eps_of(x, 0), eps_of(x, 2)
        e = e_null + lam * (e_c - e_null)
        x0 = (x - np.sqrt(1 - now) * e) / np.sqrt(now)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then) * e_null
    np.testing.assert_allclose(made, x, rtol=1e-3, atol=1e-3)


def test_refinements_take_the_pair_from_the_outside_in():
    """tangential(apg(cfg)) damps first and projects then; apg(tangential(cfg)) the reverse."""
    one = _call(guidance.tangential(guidance.apg(cfg(4.0), 0.0, 2.0), "x0"), X, T, COND).x0
    other = _call(guidance.apg(guidance.tangential(cfg(4.0), "x0"), 0.0, 2.0), X, T, COND).x0
    assert np.abs(one - other).max() > 0.1
    damped = _call(guidance.tangential(cfg(0.0), "x0"), X, T, COND).x0
    by_hand = guidance.apg(guidance.cfg(network(FLOW, GOOD, damped), 4.0, NULL), 0.0, 2.0)
    np.testing.assert_allclose(one, _call(by_hand, X, T, COND).x0, rtol=1e-3, atol=1e-3)


def test_a_result_is_changed_from_the_inside_out():
    """The outer rescale sees what the inner threshold-free stack made: clipping comes last, and
    rescaling cannot follow it."""
    stack = guidance.static_threshold(guidance.rescale(guidance.apg(cfg(6.0), 0.0), 0.7))
    made = _call(stack, X, T, COND)
    inner = _call(guidance.rescale(guidance.apg(cfg(6.0), 0.0), 0.7), X, T, COND)
    np.testing.assert_allclose(made.x0, jnp.clip(inner.x0, -1, 1), atol=1e-5)
    np.testing.assert_array_equal(made.variance, VARIANCE)
    with pytest.raises(UserError, match=r"rescale: .* extrapolates .*given Threshold"):
        guidance.rescale(stack)


def test_outside_its_interval_a_refined_guidance_is_the_conditional_model():
    inside = guidance.cfg(NETWORKS["flow"], 4.0, NULL, interval=(0.0, 9.0))  # t < 0.5
    every = inside
    for name in ("apg", "frequency", "magnitude", "rescale", "cfg_zero", "tangential"):
        every = REFINEMENTS[name](every)
    made = _call(every, X, jnp.asarray([0.6, 0.7, 0.3]), COND).x0
    np.testing.assert_allclose(made[:2], GOOD[:2], rtol=1e-4, atol=1e-4)
    assert np.abs(made[2] - GOOD[2]).max() > 0.1


def test_the_network_is_called_once_with_pairs_under_any_stack_of_refinements():
    calls = []

    def denoise(x, t, cond):
        calls.append(len(x))
        return NETWORKS["flow"](x, t, cond)

    every = guidance.cfg(denoisers.function(denoise, FLOW), 4.0, NULL)
    for refine in REFINEMENTS.values():
        every = refine(every)
    jax.eval_shape(every, X, T, COND)
    assert calls == [6]


def test_momentum_0_is_the_solver_and_momentum_remembers_the_differences():
    """d_i = (good - bad) + beta d_{i-1}, guided = good + (w - 1) d_i; good and bad are constant,
    so d_i = (1 + beta + ... + beta^i) (good - bad)."""
    times, w, beta = jnp.linspace(0.9, 0.1, 5), 3.0, -0.5
    draw = lambda solver: sample(
        KEYS[0], cfg(w), x=X, cond=COND, times=times, solver=solver,
        observe=lambda x, t, prediction: prediction.x0,
    )  # fmt: skip
    for solver in (solvers.ddim(), solvers.dpmpp_2m()):
        same(draw(guidance.with_momentum(solver, 0.0)), draw(solver), 1e-4, 1e-4)
    _, path = draw(guidance.with_momentum(solvers.ddim(), beta))
    for i, x0 in enumerate(path):
        d = (1 - beta ** (i + 1)) / (1 - beta) * (GOOD - BAD)
        np.testing.assert_allclose(x0, GOOD + (w - 1) * d, rtol=1e-3, atol=1e-3)


def test_a_sweep_over_momenta_is_one_program():
    draw = lambda beta: guidance.with_momentum(solvers.ddim(), beta)
    betas, noise = jnp.asarray([-0.5, 0.0]), fresh().at(KEYS, 0)

    def step(beta):
        solver = draw(beta)
        memory = solver.init(X, jnp.asarray([0.9, 0.5]))
        _, (_, average), _ = solver.step(
            cfg(3.0), FLOW, X, (memory[0], GOOD), 0.9, 0.5, noise, COND
        )
        return average

    made = jax.jit(jax.vmap(step))(betas)
    np.testing.assert_allclose(made[0], GOOD - BAD - 0.5 * GOOD, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made[1], GOOD - BAD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "velocity", "score"])
def test_every_target_is_inverted_and_keeps_the_rest(target):
    s = COSINE
    given = from_x0(s, X, GOOD, T)._replace(variance=VARIANCE)
    same(from_target(target, s, to_target(target, s, given, T), X, T, given), given, 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: guidance.apg(NETWORKS["flow"]), r"apg: .* given Function; e.g. apg\(cfg\("),
        (lambda: guidance.apg(cfg(2.0), norm=0.0), r"apg: norm=0.0 given; it is positive"),
        (lambda: guidance.apg(cfg(2.0), target="x"), r"apg: target 'x' is not known"),
        (lambda: guidance.rescale(cfg(2.0), 2.0), r"rescale=2.0 given"),
        (lambda: guidance.magnitude(cfg(2.0), -1.0), r"magnitude: damping=-1.0 given"),
        (lambda: guidance.frequency(cfg(2.0), octaves=0), r"frequency: octaves=0 given"),
        (lambda: guidance.zero_init(cfg(2.0), 2.0), r"zero_init: share=2.0 given"),
        (
            lambda: guidance.zero_init(denoisers.function(lambda *a: a, schedules.ve())),
            r"zero_init: VE has its data at t = -inf",
        ),
        (
            lambda: guidance.frequency(guidance.cfg(lambda x, t, c: Prediction(x, x), 2.0, NULL))(
                X[:, 0], T, COND
            ),
            r"frequency: images \[B, H, W, C\] are needed, given shape \(3, 4, 2\)",
        ),
        (
            lambda: guidance.tangential(cfg(2.0), "eps"),
            r"tangential: alpha = 0 at t_max of RectifiedFlow; target 'eps' .* use v",
        ),
        (
            lambda: guidance.with_momentum(solvers.heun()),
            r"with_momentum: .* evaluates 2 times a step",
        ),
        (
            lambda: sample(
                KEYS[0], NETWORKS["edm"], x=X, cond=COND, times=grids.karras(EDM, 2),
                solver=guidance.with_momentum(solvers.ddim()),
            ),
            r"with_momentum: .* extrapolates a pair",
        ),
    ],
)  # fmt: skip
def test_a_refinement_that_cannot_work_is_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
