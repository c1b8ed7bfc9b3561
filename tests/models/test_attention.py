"""The attention module: softmax a head, in float32, over grids and over other places."""

import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jdiff import models
from jdiff.errors import UserError
from jdiff.models import attention
from jdiff.models.attention import KERNELS, Attention

HEADS, SIZE = 2, 3
PLAIN = ("xla", "by_head")  # the kernels that run anywhere


def softmax_attention(q, k, v, mask=None):
    """By hand, head by head: tokens [B, N, C] to places [B, M, C]."""
    out = np.zeros(q.shape)
    for head in range(HEADS):
        cut = slice(head * SIZE, (head + 1) * SIZE)
        logits = np.einsum("bqc,bkc->bqk", q[..., cut], k[..., cut]) / math.sqrt(SIZE)
        if mask is not None:
            logits = np.where(mask[:, min(head, mask.shape[1] - 1)], logits, -np.inf)
        out[..., cut] = scipy.special.softmax(logits, axis=-1) @ v[..., cut]
    return out


@pytest.mark.parametrize("kernel", PLAIN)
@pytest.mark.parametrize(("grid", "places"), [((4,), (4,)), ((2, 2), (2, 2)), ((2, 2), (5,))])
def test_attention_is_softmax_per_head(grid, places, kernel):
    random = np.random.default_rng(0)
    channels = HEADS * SIZE
    q, k, v = (random.normal(size=(2, *shape, channels)) for shape in (grid, places, places))
    out = Attention(HEADS, KERNELS[kernel])(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
    flat = (a.reshape(2, -1, channels) for a in (q, k, v))
    np.testing.assert_allclose(out, softmax_attention(*flat).reshape(q.shape), atol=1e-6)


@pytest.mark.parametrize("kernel", PLAIN)
@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (2, 1, 4, 5), (2, HEADS, 4, 5)])
def test_masked_places_are_not_seen(shape, kernel):
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, n, HEADS * SIZE)).astype(np.float32) for n in (4, 5, 5))
    mask = random.random(shape) < 0.5
    mask[..., 0] = True
    out = Attention(HEADS, KERNELS[kernel])(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(out, softmax_attention(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("kernel", PLAIN)
def test_a_query_that_sees_nothing_sees_the_mean_and_has_a_gradient(kernel):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 4, HEADS * SIZE)).astype(np.float32)
    attend = Attention(HEADS, KERNELS[kernel])
    mask = jnp.zeros((2, 1, 1, 4), bool)
    mean = np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    np.testing.assert_allclose(attend(q, k, v, mask), mean, atol=1e-6)
    assert np.isfinite(jax.grad(lambda q: attend(q, k, v, mask).sum())(q)).all()


@pytest.mark.parametrize("kernel", PLAIN)
def test_derivatives_are_those_of_jax(kernel):
    """Backward and forward, against `jax.nn.dot_product_attention`; large logits too."""
    random = np.random.default_rng(0)
    args = tuple(
        jnp.asarray(a, jnp.float32) for a in 4 * random.normal(size=(3, 2, 6, HEADS, SIZE))
    )
    along = tuple(jnp.asarray(a, jnp.float32) for a in random.normal(size=(3, *args[0].shape)))
    mask = jnp.asarray(random.random((2, 1, 6, 6)) < 0.7).at[..., 0].set(True)
    ours = lambda *args: KERNELS[kernel](*args, mask=mask)
    theirs = lambda *args: jax.nn.dot_product_attention(*args, mask=mask)
    for f in (
        lambda attend: jax.vjp(attend, *args)[1](along[0]),
        lambda attend: jax.jvp(attend, args, along),
    ):
        for got, want in zip(f(ours), f(theirs)):
            np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("kernel", PLAIN)
def test_attention_softmax_is_float32_in_bfloat16(kernel):
    # 1,000 equal keys: weights of 0.001 summed in bfloat16 would stall at 0.25.
    ones = jnp.ones((1, 1000, 1), jnp.bfloat16)
    out = Attention(1, KERNELS[kernel])(ones, ones, ones)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0]) == pytest.approx(1.0, abs=0.01)


def test_by_head_keeps_no_maps_of_all_heads():
    shape = jax.ShapeDtypeStruct((1, 256, 8, 4), "float32")
    maps = 8 * 256 * 256 * 4

    def memory(kernel):
        loss = lambda q: kernel(q, q, q).sum()
        return jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes

    assert memory(attention.by_head) < maps < memory(attention.dot_product)


# Kernels by name


def test_a_network_takes_kernels_by_name():
    fields = {"in_channels": 2, "width": 16, "depth": 1, "heads": 2}
    apply, _ = models.abstract(lambda rngs: models.DiT(**fields, rngs=rngs))
    assert apply.with_attention("by_head") == apply.with_attention(attention.by_head)
    with pytest.raises(UserError, match="attention kernel 'cuda' is not known. Did you mean"):
        apply.with_attention("cuda")


def test_cudnn_refuses_float32_with_the_way_out():
    q = jnp.ones((1, 2, 1, 8))
    with pytest.raises(UserError, match="takes bfloat16 or float16, not float32.*dtype='bfloat16'"):
        attention.cudnn(q, q, q)


def test_flash_is_tokamax_on_places_in_one_axis(monkeypatch):
    q = jnp.ones((1, 2, 3, 1, 8))
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(UserError, match="pip install tokamax"):
        attention.flash(q, q, q)
    asked = []

    def attend(q, k, v, *, mask):
        asked.append((q.shape, k.shape, v.shape, mask))
        return q

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(dot_product_attention=attend))
    assert attention.flash(q, q[:, :1], q[:, :1]).shape == q.shape
    assert asked == [((1, 6, 1, 8), (1, 3, 1, 8), (1, 3, 1, 8), None)]
