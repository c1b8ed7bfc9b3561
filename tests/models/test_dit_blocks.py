"""The four conditionings of DiT: published counts, formulas written out, and what each may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.errors import UserError
from jdiff.models import layers
from jdiff.models.dit_blocks import BLOCKS

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 8, 4, 2)).astype(np.float32)
T = np.asarray([3.0, 0.2, 900.0], np.float32)
LABEL = np.asarray([1, 4, 0], np.int32)
FIELDS = {"in_channels": 2, "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 4}


def small(rngs, **changes):
    return models.DiT(**(FIELDS | changes), rngs=rngs)


def untied(rngs, **changes):
    return models.UntiedDiT(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(block, **changes):
    """`(jitted apply, params)` with every weight random; the same weights scanned or not."""
    build = untied if block == "untied" else functools.partial(small, block=block)
    apply, _ = models.init(functools.partial(build, **changes), KEY)
    _, params = models.init(build, KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.2 * random.standard_normal(w.shape, np.float32), params)
    return jax.jit(apply), models.stack_blocks(params) if changes.get("scan") else params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("in_context", 449_162_528),
        ("cross_attention", 597_991_712),
        ("adaln", 600_452_384),
        ("adaln_zero", 674_834_720),
    ],
)
def test_published_parameter_counts(block, expected, scan):
    fields = models.dit_imagenet("XL/2", block=block, scan=scan)
    _, shapes = models.abstract(lambda rngs: models.DiT(**fields, rngs=rngs))
    assert models.count(shapes) == expected


def linear(w, v):
    return v @ w["kernel"].reshape(len(w["kernel"]), -1) + w["bias"].ravel()


def norm(v, w=None, eps=1e-6):
    v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + eps)
    return v if w is None else v * w["scale"] + w["bias"]


def attend(query, key, value):
    out = []
    for q, k, u in zip(*(np.split(part, 2, axis=-1) for part in (query, key, value))):
        logits = np.exp(np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(q.shape[-1]))
        out.append(logits / logits.sum(-1, keepdims=True) @ u)
    return np.concatenate(out, axis=-1)


def self_attention(w, v):
    return linear(w["project"], attend(*np.split(linear(w["qkv"], v), 3, axis=-1)))


def mlp(w, v):
    v = linear(w["mlp1"], v)
    v = 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    return linear(w["mlp2"], v)


def adaln(w, h, c):
    shift1, scale1, shift2, scale2 = np.split(linear(w["modulation"], c)[:, None], 4, -1)
    h = h + self_attention(w, norm(h) * (1 + scale1) + shift1)
    return h + mlp(w, norm(h) * (1 + scale2) + shift2)


def in_context(w, h):
    h = h + self_attention(w, norm(h, w["norm1"]))
    return h + mlp(w, norm(h, w["norm2"]))


def cross_attention(w, h, tokens):
    h = h + self_attention(w, norm(h, w["norm1"]))
    q = linear(w["cross_q"], norm(h, w["cross_norm"]))
    k, v = np.split(linear(w["cross_kv"], tokens), 2, axis=-1)
    h = h + linear(w["cross_project"], attend(q, k, v))
    return h + mlp(w, norm(h, w["norm2"]))


@pytest.mark.parametrize(
    ("formula", "conditions"), [(adaln, [(2, 8)]), (in_context, []), (cross_attention, [(2, 2, 8)])]
)
def test_block_against_the_formula(formula, conditions):
    random = np.random.default_rng(2)
    build = functools.partial(BLOCKS[formula.__name__], 8, 2, 16, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    params = jax.tree.map(lambda w: 0.5 * random.standard_normal(w.shape, np.float32), params)
    inputs = [random.standard_normal(shape, np.float32) for shape in [(2, 5, 8), *conditions]]
    y = jax.jit(apply.merge(params).__call__)(*inputs)
    np.testing.assert_allclose(y, formula(params, *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [*BLOCKS, "untied"])
def test_scan_changes_no_number_and_conditions_are_seen(block):
    apply, params = network(block)
    scanned, stacked = network(block, scan=True)
    y = np.asarray(apply(params, X, T, {"label": LABEL}))
    assert y.shape == X.shape
    np.testing.assert_allclose(scanned(stacked, X, T, {"label": LABEL}), y, rtol=1e-4, atol=1e-4)
    later = T + np.asarray([0, 0.5, 0], np.float32)
    relabelled = np.asarray([1, 2, 0], np.int32)
    for z in (
        apply(params, X, later, {"label": LABEL}),
        apply(params, X, T, {"label": relabelled}),
    ):
        moved = np.abs(np.asarray(z) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-3  # sample 1 is told something else, the others are not
        assert moved[[0, 2]].max() < 1e-5


def test_tied_embeddings_make_the_untied_network_a_dit():
    """Equal copies of the embeddings, as diffusers has them, are the plain network at t = 0."""
    apply, params = network("adaln_zero")
    many, _ = models.abstract(functools.partial(untied, mlp_eps=1e-6))
    shared = {name: params[name] for name in ("time1", "time2", "label")}
    blocks = {i: block | shared for i, block in params["blocks"].items()}
    rest = {name: leaf for name, leaf in params.items() if name not in shared}
    t = np.zeros(3, np.float32)  # whose waves do not depend on the frequencies
    expected = apply(params, X, t, {"label": LABEL})
    y = jax.jit(many)(rest | {"blocks": blocks}, X, t, {"label": LABEL})
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_positions_of_another_size_are_spread_over_the_training_grid():
    """Twice the patches of the training image, and each second one sits where a patch was."""
    wide = layers.grid_embedding(4, 2, 16, (0.5, 1.0)).reshape(4, 2, 16)
    np.testing.assert_allclose(wide[::2], layers.grid_embedding(2, 2, 16).reshape(2, 2, 16))
    assert np.abs(wide[1] - wide[0]).max() > 0.1
    apply, params = network("adaln_zero")
    same, spread = network("adaln_zero", image_size=8)[0], network("adaln_zero", image_size=4)[0]
    square = np.concatenate([X, X], axis=2)
    y = apply(params, square, T, {"label": LABEL})
    np.testing.assert_allclose(same(params, square, T, {"label": LABEL}), y, atol=1e-5)
    assert np.abs(spread(params, square, T, {"label": LABEL}) - y).max() > 1e-3


def test_unknown_block_offers_the_nearest():
    with pytest.raises(UserError, match=r"block 'adaln-zero' is not known.*'adaln_zero'"):
        models.abstract(functools.partial(small, block="adaln-zero"))
    with pytest.raises(ValueError, match="image_size=5 must be a multiple of patch=2"):
        models.abstract(functools.partial(small, image_size=5))
