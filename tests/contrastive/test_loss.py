"""The symmetric InfoNCE loss: closed forms, invariances, the published clip of the temperature."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import parallel
from jdiff.contrastive.loss import LIMIT, SCALE, info_nce, limited, unit

loss = jax.jit(info_nce)


def pairs(n=8, d=5, seed=0):
    rng = np.random.default_rng(seed)
    made = (rng.normal(size=(n, d)) for _ in range(2))
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in made]


def naive(u, v, scale):
    """Softmaxes written out: the mean of -log p(text i | image i) and -log p(image i | text i)."""
    logits = scale * np.array([[a @ b for b in v] for a in u])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    q = np.exp(logits) / np.exp(logits).sum(axis=0, keepdims=True)
    return np.array([-np.log(p[i, i] * q[i, i]) / 2 for i in range(len(u))])


@closed_forms.x64
def test_it_is_the_naive_formula():
    u, v = pairs()
    np.testing.assert_allclose(loss(u, v, SCALE), naive(u, v, SCALE), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 7])
@closed_forms.x64
def test_of_equal_logits_it_is_log_n(n):
    u = np.tile([[0.6, 0.8]], (n, 1))
    np.testing.assert_allclose(loss(u, u, 37.0), np.full(n, np.log(n)), rtol=1e-12)
    np.testing.assert_allclose(loss(*pairs(n), 0.0), np.full(n, np.log(n)), rtol=1e-12)


@closed_forms.x64
def test_orthogonal_pairs_have_the_closed_form():
    """Vectors of a basis: the own logit is s, the others 0, so log(exp s + N - 1) - s."""
    n, s = 6, 3.0
    expected = np.full(n, np.log(np.exp(s) + n - 1) - s)
    np.testing.assert_allclose(loss(np.eye(n), np.eye(n), s), expected, rtol=1e-12)


def test_large_scales_do_not_overflow():
    u, v = pairs()
    assert np.all(np.isfinite(loss(jnp.float32(u), jnp.float32(v), 1e4)))
    np.testing.assert_allclose(loss(np.float32(u), np.float32(u), 1e4), 0.0, atol=1e-2)


@closed_forms.x64
def test_gradients_and_invariances():
    """Both sides count equally; a rotation of the space and a reordering of pairs change nothing;
    the length of a vector has no gradient."""
    u, v = pairs()
    mean = jax.jit(lambda u, v: loss(u, v, SCALE).mean())
    slopes = jax.jit(jax.grad(mean, (0, 1)))
    du, dv = slopes(u, v)
    swapped = slopes(v, u)[::-1]
    np.testing.assert_allclose((du, dv), swapped, atol=1e-14)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    np.testing.assert_allclose(mean(u @ rotation, v @ rotation), mean(u, v), rtol=1e-12)
    order = np.random.default_rng(2).permutation(8)
    moved = loss(u[order], v[order], SCALE)
    np.testing.assert_allclose(moved, loss(u, v, SCALE)[order], rtol=1e-12)
    along = jax.jit(jax.grad(lambda x: loss(unit(x), v, SCALE).mean()))(3.0 * u)
    np.testing.assert_allclose((along * u).sum(axis=1), 0.0, atol=1e-14)


def test_units_have_length_one_and_nothing_stays_nothing():
    x = unit(jnp.asarray([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(x, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 2)))))


def test_over_four_devices_the_negatives_are_those_of_the_whole_batch():
    mesh = parallel.make({"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1})
    layout = parallel.layout.layout(mesh)
    u, v = (x.astype(np.float32) for x in pairs())
    rows = lambda a: jax.lax.with_sharding_constraint(a, layout.batch)
    split = jax.jit(lambda u, v: info_nce(u, v, SCALE, rows), in_shardings=(layout.batch,) * 2)
    found = split(u, v)
    assert not found.is_fully_replicated
    np.testing.assert_allclose(found, naive(u, v, SCALE), rtol=1e-5)
    parts = np.concatenate([naive(u[i : i + 2], v[i : i + 2], SCALE) for i in (0, 2, 4, 6)])
    assert np.abs(found - parts).max() > 0.1  # what each device would have found by itself


def test_the_temperature_stops_at_its_limit_and_comes_back():
    optimizer = limited(optax.sgd(1.0))
    params = {"log_scale": jnp.log(LIMIT) - 0.5, "w": jnp.zeros(2)}
    state = optimizer.init(params)

    def moved(params, slope):
        grads = {"log_scale": jnp.float32(slope), "w": jnp.ones(2)}
        return optax.apply_updates(params, optimizer.update(grads, state, params)[0])

    up = moved(moved(params, -0.4), -3.0)
    np.testing.assert_allclose(up["log_scale"], np.log(100), rtol=1e-6)
    np.testing.assert_allclose(up["w"], -2.0)
    np.testing.assert_allclose(moved(up, 0.25)["log_scale"], np.log(100) - 0.25, rtol=1e-6)
