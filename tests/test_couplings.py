"""Couplings: they rematch a batch and change nothing else; optimal ones are optimal."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdiff import UserError, couplings, denoisers, losses, schedules
from jdiff.predictions import parameterization

HAVE_OTT = importlib.util.find_spec("ott") is not None
NEEDS_OTT = pytest.mark.skipif(not HAVE_OTT, reason="ott-jax is not installed: the extra `ot`")
KEY = jax.random.key(0)
B = 32


OPTIMAL = [
    pytest.param(couplings.ot, id="ot"),
    pytest.param(lambda: couplings.sinkhorn(0.05), id="sinkhorn", marks=NEEDS_OTT),
]


def _batch(b=B):
    """Data, noise of the same tree, and conditions that name their data."""
    k = jax.random.split(jax.random.key(7), 4)
    x0 = {"a": 2 + jax.random.normal(k[0], (b, 2, 3)), "b": jax.random.normal(k[1], (b, 1))}
    eps = {"a": jax.random.normal(k[2], (b, 2, 3)), "b": jax.random.normal(k[3], (b, 1))}
    return x0, eps, {"label": jnp.arange(b), "copy": x0["b"]}


def _cost(x0, eps):
    return sum(
        float(np.square(np.asarray(a, float) - np.asarray(b, float)).sum())
        for a, b in zip(jax.tree.leaves(x0), jax.tree.leaves(eps))
    )


@pytest.fixture(scope="module")
def coupled():
    """Every coupling of the batch, from one program."""
    made = {name: make() for name, make in couplings.BY_NAME.items()}
    if HAVE_OTT:
        made["sinkhorn"] = couplings.sinkhorn(0.5)
    else:
        del made["sinkhorn"]
    run = jax.jit(lambda key, *batch: {name: c(key, *batch) for name, c in made.items()})
    return run(KEY, *_batch())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=NEEDS_OTT if n == "sinkhorn" else ()) for n in couplings.BY_NAME]
)
def test_conditions_stay_with_their_data(coupled, name):
    x0, _, cond = coupled[name]
    originals, _, _ = _batch()
    np.testing.assert_array_equal(cond["copy"], x0["b"])
    np.testing.assert_array_equal(x0["a"], originals["a"][cond["label"]])


@pytest.mark.parametrize("name", ["independent", "paired", "ot"])
def test_both_marginals_are_those_of_the_batch(coupled, name):
    """A permutation: each row of eps, with all its leaves, once."""
    _, eps, _ = coupled[name]
    _, given, _ = _batch()
    rows = lambda e: np.concatenate([e["a"].reshape(B, -1), e["b"]], 1)
    np.testing.assert_array_equal(
        rows(eps)[np.lexsort(rows(eps).T)], rows(given)[np.lexsort(rows(given).T)]
    )


def test_optimal_couplings_cost_no_more_than_independent(coupled):
    cost = {name: _cost(*c[:2]) for name, c in coupled.items()}
    assert cost["ot"] < 0.8 * min(cost["paired"], cost["independent"])
    if HAVE_OTT:
        assert cost["ot"] <= cost["sinkhorn"] < 0.9 * cost["independent"]


def test_the_assignment_is_the_best_of_all_permutations():
    cost = np.asarray(jax.random.uniform(KEY, (3, 6, 6)))
    found = jax.vmap(couplings.assignment)(jnp.asarray(cost))
    for c, columns in zip(cost, found):
        best = min(itertools.permutations(range(6)), key=lambda p: c[range(6), p].sum())
        assert columns.tolist() == list(best)


@pytest.mark.parametrize("make", OPTIMAL)
def test_a_shuffled_batch_is_matched_with_itself(make):
    x = 100 + jax.random.normal(KEY, (B, 8))  # an offset, which must not cost digits
    shuffled = x[jax.random.permutation(jax.random.key(1), B)]
    _, eps, _ = jax.jit(make())(KEY, x, shuffled)
    np.testing.assert_array_equal(eps, x)


def test_distances_are_those_of_float64_differences():
    x0, eps, _ = _batch()
    flat = lambda e: np.concatenate([np.asarray(e["a"], float).reshape(B, -1), e["b"]], 1)
    expected = np.square(flat(x0)[:, None] - flat(eps)[None]).sum(-1)
    made = couplings.squared_distances(x0, eps)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


@NEEDS_OTT
def test_sinkhorns_plan_has_uniform_marginals_and_the_form_of_an_entropic_plan():
    """log P = f_i + g_j - C_ij / epsilon: second differences of log P are those of -C / epsilon."""
    x0, eps, _ = _batch()
    plan = couplings.sinkhorn(2.0)
    log_p = np.asarray(jax.jit(lambda: plan.log_plan(x0, eps))(), float)
    np.testing.assert_allclose(np.exp(log_p).sum(0), 1 / B, rtol=2e-2)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1 / B, rtol=2e-2)
    mixed = lambda m: m[1:, 1:] - m[:-1, 1:] - m[1:, :-1] + m[:-1, :-1]
    cost = np.asarray(couplings.squared_distances(x0, eps), float)
    np.testing.assert_allclose(mixed(log_p), -mixed(cost) / 2.0, atol=1e-3)


@NEEDS_OTT
def test_sinkhorn_draws_from_its_plan():
    """Frequencies over many keys against the plan; epsilon is relative to the mean cost."""
    x0, eps = jnp.asarray([[0.0], [1.0], [2.0]]), jnp.asarray([[0.1], [0.9], [2.5]])
    relative = couplings.sinkhorn(0.5, relative=True)
    mean = float(couplings.squared_distances(x0, eps).mean())

    @jax.jit
    def run(keys):
        names = jnp.arange(3.0)[:, None]
        draw = lambda k: jax.random.categorical(k, relative.log_plan(x0, eps), axis=1)
        coupled = jax.vmap(lambda k: relative(k, x0, eps)[1])(keys)
        return jax.vmap(draw)(keys), coupled, relative.log_plan(x0, eps), names

    index, drawn, log_p, _ = run(jax.random.split(KEY, 4000))
    np.testing.assert_array_equal(drawn, eps[index])
    shares = np.stack([(np.asarray(index) == j).mean(0) for j in range(3)], 1)
    np.testing.assert_allclose(shares, 3 * np.exp(log_p), atol=4 / np.sqrt(4000))
    absolute = couplings.sinkhorn(0.5 * mean).log_plan(x0, eps)
    np.testing.assert_allclose(absolute, log_p, atol=1e-3)


@pytest.mark.parametrize("make", OPTIMAL)
def test_a_coupled_loss_has_gradients_in_a_compiled_step_on_several_devices(make):
    """The matching is a constant to the gradient; a batch over four devices gives what one does."""
    x0, eps = (jax.random.normal(k, (B, 5)) for k in jax.random.split(KEY))
    apply = lambda w, x, t, cond, key: w * x

    def loss(w, x0, eps):
        x0, eps, cond = make()(KEY, x0, eps, None)
        net = denoisers.network(apply, w, schedules.rectified_flow(), parameterization("velocity"))
        return losses.flow_matching(KEY, net, x0, cond, eps=eps).mean()

    step = jax.jit(jax.value_and_grad(loss))
    value, slope = step(0.3, x0, eps)
    assert np.isfinite(slope) and float(slope) != 0
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    spread = jax.device_put((x0, eps), NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(step(0.3, *spread), (value, slope), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: couplings.sinkhorn(0.0), "sinkhorn: epsilon=0.0 given"),
        (
            lambda: couplings.ot()(KEY, {"a": jnp.ones((4, 2))}, {"a": jnp.ones((3, 2))}),
            r"couplings.ot: x0\['a'\] is \(4, 2\) and eps \(3, 2\)",
        ),
        (
            lambda: couplings.ot()(KEY, *[{"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))}] * 2),
            r"couplings.ot: x0\['b'\] has 3 samples, the first leaf 4",
        ),
        (
            lambda: couplings.paired()(KEY, {"a": jnp.ones(4)}, jnp.ones(4)),
            "x0 and eps are different trees",
        ),
    ],
)
def test_endpoints_that_do_not_match_are_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()
