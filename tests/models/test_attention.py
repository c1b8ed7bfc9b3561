"""The attention module: softmax a head, in float32, over grids and over other places."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jdiff.models.attention import Attention

HEADS, SIZE = 2, 3


def softmax_attention(q, k, v):
    """By hand, head by head: tokens [B, N, C] to places [B, M, C]."""
    out = np.zeros(q.shape)
    for head in range(HEADS):
        cut = slice(head * SIZE, (head + 1) * SIZE)
        logits = np.einsum("bqc,bkc->bqk", q[..., cut], k[..., cut]) / math.sqrt(SIZE)
        out[..., cut] = scipy.special.softmax(logits, axis=-1) @ v[..., cut]
    return out


@pytest.mark.parametrize(("grid", "places"), [((4,), (4,)), ((2, 2), (2, 2)), ((2, 2), (5,))])
def test_attention_is_softmax_per_head(grid, places):
    random = np.random.default_rng(0)
    channels = HEADS * SIZE
    q, k, v = (random.normal(size=(2, *shape, channels)) for shape in (grid, places, places))
    out = Attention(HEADS)(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
    flat = (a.reshape(2, -1, channels) for a in (q, k, v))
    np.testing.assert_allclose(out, softmax_attention(*flat).reshape(q.shape), atol=1e-6)


def test_attention_softmax_is_float32_in_bfloat16():
    # 1,000 equal keys: weights of 0.001 summed in bfloat16 would stall at 0.25.
    ones = jnp.ones((1, 1000, 1), jnp.bfloat16)
    assert float(Attention(1)(ones, ones, ones)[0, 0, 0]) == pytest.approx(1.0, abs=0.01)
