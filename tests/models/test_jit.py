"""JiT: published counts, its block written out, rotary positions, and the tokens of the class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models import jit, rope

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 12, 8, 2)).astype(np.float32)
T = np.asarray([0.9, 0.2, 0.5], np.float32)
LABEL = np.asarray([1, 4, 0], np.int32)
FIELDS = {"in_channels": 2, "patch": 4, "bottleneck": 6, "width": 16, "depth": 3, "heads": 2}
FIELDS |= {"num_classes": 4, "context": 2, "context_start": 1}
STACKS = ("blocks", "context_blocks")


def small(rngs, **changes):
    return models.JiT(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.init(functools.partial(small, **changes), KEY)
    _, params = models.init(small, KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.2 * random.standard_normal(w.shape, np.float32), params)
    return apply, models.stack_blocks(params, STACKS) if changes.get("scan") else params


CALL = jax.jit(lambda apply, params, label: apply(params, X, T, {"label": label}), static_argnums=0)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"), [("B/16", 131_123_712), ("L/16", 458_877_664), ("H/16", 952_514_368)]
)
def test_published_parameter_counts(name, expected, scan):
    fields = models.jit_imagenet(name, scan=scan)
    _, shapes = models.abstract(lambda rngs: models.JiT(**fields, rngs=rngs))
    assert models.count(shapes) == expected


def block(scale=0.5):
    """`(its function of inputs, weights)` of a block of width 8 with two heads."""
    random = np.random.default_rng(2)
    build = functools.partial(jit.Block, 8, 2, 5, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    params = jax.tree.map(
        lambda w: w + scale * random.standard_normal(w.shape).astype(np.float32), params
    )
    return jax.jit(apply.merge(params).__call__), params


def test_starts_at_zero_with_identity_blocks():
    apply, params = models.init(small, KEY)
    np.testing.assert_array_equal(CALL(apply, params, LABEL), np.zeros_like(X))
    h, c, turn = jnp.asarray(X.reshape(3, -1, 8)), jnp.ones((3, 8)), jnp.ones((24, 2))
    np.testing.assert_array_equal(block(scale=0.0)[0](h, c, turn), h)


def test_block_against_the_formula():
    """RMSNorm, six vectors in adaLN's order, normalised and turned q and k, SwiGLU, in numpy."""
    apply, w = block()
    random = np.random.default_rng(3)
    h, c = random.standard_normal((2, 5, 8)), random.standard_normal((2, 8))
    turn = random.standard_normal((5, 2))

    def linear(name, v):
        kernel = w[name]["kernel"]
        return v @ kernel.reshape(len(kernel), -1) + w[name]["bias"].ravel()

    def norm(name, v):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * w[name]["scale"]

    def turned(v):
        pairs = v.reshape(2, 5, 2, 2) @ np.asarray([1, 1j]) * np.exp(1j * turn)  # [..., plane]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(v.shape)

    def attend(v):
        out = []
        q, k, v = (np.split(part, 2, axis=-1) for part in np.split(linear("qkv", v), 3, axis=-1))
        for one, other, value in zip(q, k, v):
            one, other = turned(norm("norm_q", one)), turned(norm("norm_k", other))
            logits = np.exp(np.einsum("bqc,bkc->bqk", one, other) / 2.0)
            out.append(logits / logits.sum(-1, keepdims=True) @ value)
        return linear("project", np.concatenate(out, axis=-1))

    vectors = np.split(linear("modulation", c)[:, None], 6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors
    expected = h + gate1 * attend(norm("norm1", h) * (1 + scale1) + shift1)
    y = linear("mlp1", norm("norm2", expected) * (1 + scale2) + shift2)
    gate, value = np.split(y, 2, axis=-1)
    expected = expected + gate2 * linear("mlp2", gate / (1 + np.exp(-gate)) * value)
    y = apply(jnp.float32(h), jnp.float32(c), jnp.float32(turn))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_attention_sees_differences_of_positions_alone():
    apply, _ = block()
    h, c = jnp.asarray(X[:, :6].reshape(3, -1, 8)), jnp.ones((3, 8))
    places = rope.grid(range(3), range(4))
    y, moved, stretched = (
        apply(h, c, rope.angles(p, (2, 2))) for p in (places, places + (5.0, -3.0), 2 * places)
    )
    np.testing.assert_allclose(moved, y, rtol=1e-4, atol=1e-4)
    assert np.abs(stretched - y).max() > 1e-2


def test_class_tokens_tell_the_blocks_after_they_come_in():
    """With norms that ignore c, the label is seen by its tokens alone, and not before them."""
    apply, params = network()

    def deaf(path, w):
        if "modulation" not in jax.tree_util.keystr(path):
            return w
        return jnp.zeros_like(w) if w.ndim == 2 else w

    params = jax.tree_util.tree_map_with_path(deaf, params)
    other = np.asarray([2, 4, 0], np.int32)
    before = apply.without_blocks("context_blocks")
    for net, seen in ((apply, True), (before, False)):
        one, two = (np.asarray(CALL(net, params, label)) for label in (LABEL, other))
        moved = np.abs(one - two).max(axis=(1, 2, 3))
        assert (moved[0] > 1e-4) == seen
        assert moved[1:].max() < 1e-6


def test_scan_changes_no_number_and_every_weight_gets_a_gradient(all_gradients_live):
    apply, params = network()
    scanned, stacked = network(scan=True, remat=True)

    def loss(params):
        y = scanned(params, X, T, {"label": LABEL})
        return jnp.square(y).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
    np.testing.assert_allclose(y, CALL(apply, params, LABEL), rtol=1e-4, atol=1e-4)
    all_gradients_live(grads)


def test_no_class_no_tokens_and_flow_maps():
    build = functools.partial(small, num_classes=0, context=0, scalars=("t-s",))
    apply, params = models.abstract(build)
    assert not {"label", "context_blocks", "context_places"} & params.keys()
    assert len(params["blocks"]) == 3
    assert jax.eval_shape(apply, params, X, T, {"s": T * 0.5}).shape == X.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 8}, r"width=16 must be a multiple of 4 \* heads = 32"),
        ({"num_classes": 0}, "context=2 tokens of the class need num_classes"),
        ({"context_start": 3}, "context_start=3 must be between 1 and depth - 1"),
        ({"bottleneck": 0}, "bottleneck=0 must be positive"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))
    with pytest.raises(ValueError, match=r"name='JiT-B/8' is none of .*nearest is 'B/"):
        models.jit_imagenet("JiT-B/8")
