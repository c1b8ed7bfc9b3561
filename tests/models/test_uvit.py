"""U-ViT: published counts, its blocks written out, long skips, and tokens for all it is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jdiff import models
from jdiff.models import uvit

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 8, 8, 2)).astype(np.float32)
TEXT = np.random.default_rng(1).standard_normal((3, 2, 6)).astype(np.float32)
COND = {"label": np.asarray([1, 4, 0], np.int32), "text": TEXT}
T = np.asarray([3.0, 0.2, 900.0], np.float32)
FIELDS = {"image_size": 8, "in_channels": 2, "patch": 4, "width": 16, "depth": 5, "heads": 2}
FIELDS |= {"num_classes": 4, "text_width": 6, "text_tokens": 2}
STACKS = ("encoder", "decoder")


def small(rngs, **changes):
    return models.UViT(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.init(functools.partial(small, **changes), KEY)
    _, params = models.init(small, KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.2 * random.standard_normal(w.shape, np.float32), params)
    return apply, models.stack_blocks(params, STACKS) if changes.get("scan") else params


CALL = jax.jit(lambda apply, params, t, cond: apply(params, X, t, cond), static_argnums=0)


TEXTUAL = {"image_size": 32, "in_channels": 4, "text_width": 768}
SMALL = {"image_size": 64, "patch": 4, "num_classes": 999}  # and the null; theirs has none there


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("fields", "millions", "expected"),
    [
        (models.uvit_pixels("S", image_size=32), 44, 44_255_328),
        (models.uvit_pixels("S-deep", **TEXTUAL), 58, 58_345_636),
        (models.uvit_pixels("M", **SMALL), 131, 130_940_292),
        (models.uvit_pixels("L", **SMALL), 287, 286_827_652),
        (models.uvit_imagenet("L/2"), 287, 286_763_172),
        (models.uvit_imagenet("H/2"), 501, 500_832_016),
        (models.uvit_imagenet("H/4"), 501, 500_942_656),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_published_parameter_counts(fields, millions, expected, scan):
    """Table 1 of the paper in millions, and the exact numbers of the authors' code."""
    _, shapes = models.abstract(lambda rngs: models.UViT(**(fields | {"scan": scan}), rngs=rngs))
    assert models.count(shapes) == expected
    assert round(expected / 1e6) == millions


def test_joining_block_against_the_formula():
    random = np.random.default_rng(2)
    build = functools.partial(uvit.JoiningBlock, 8, 2, 16, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    w = jax.tree.map(lambda w: 0.5 * random.standard_normal(w.shape).astype(np.float32), params)
    h, skip = random.standard_normal((2, 2, 5, 8))
    y = jax.jit(apply.merge(w).__call__)(jnp.float32(h), jnp.float32(skip))

    def linear(name, v):
        kernel = w[name]["kernel"]
        return v @ kernel.reshape(len(kernel), -1) + w[name].get("bias", 0.0)

    def norm(name, v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * w[name]["scale"] + w[name]["bias"]

    def attend(v):
        out = []
        q, k, v = (np.split(part, 2, axis=-1) for part in np.split(linear("qkv", v), 3, axis=-1))
        for one, other, value in zip(q, k, v):
            logits = np.exp(np.einsum("bqc,bkc->bqk", one, other) / 2.0)
            out.append(logits / logits.sum(-1, keepdims=True) @ value)
        return linear("project", np.concatenate(out, axis=-1))

    h = linear("join", np.concatenate([h, skip], axis=-1))
    h = h + attend(norm("norm1", h))
    y1 = linear("mlp1", norm("norm2", h))
    h = h + linear("mlp2", y1 * 0.5 * (1 + erf(y1 / np.sqrt(2))))
    np.testing.assert_allclose(y, h, rtol=1e-4, atol=1e-4)
    assert "bias" not in w["qkv"]


@pytest.mark.parametrize("scan", [False, True])
def test_the_last_block_is_given_what_left_the_first(scan):
    """If the decoder's last passes its skip on alone, only the encoder's first block counts."""
    apply, params = network(scan=scan)
    flat, _ = network()
    params = models.unstack_blocks(params, STACKS) if scan else params
    last = dict(params["decoder"]["1"])
    only_skip = jnp.concatenate([jnp.zeros((16, 16)), jnp.eye(16)])
    last["join"] = {"kernel": only_skip, "bias": jnp.zeros(16)}
    nothing = lambda w: jax.tree.map(jnp.zeros_like, w)
    last |= {"project": nothing(last["project"]), "mlp2": nothing(last["mlp2"])}
    params = params | {"decoder": params["decoder"] | {"1": last}}
    fits = lambda p: models.stack_blocks(p, STACKS) if scan else p
    y = CALL(apply, fits(params), T, COND)
    others = params | {"encoder": params["encoder"] | {"1": params["encoder"]["0"]}}
    np.testing.assert_allclose(CALL(apply, fits(others), T, COND), y, atol=1e-5)
    changed = params | {"encoder": params["encoder"] | {"0": params["encoder"]["1"]}}
    assert np.abs(CALL(apply, fits(changed), T, COND) - y).max() > 1e-2
    alone = flat.without_blocks("encoder/1|middle|decoder/0")
    np.testing.assert_allclose(CALL(alone, params, T, COND), y, atol=1e-5)


def test_scan_changes_no_number_and_every_weight_gets_a_gradient(all_gradients_live):
    apply, params = network()
    scanned, stacked = network(scan=True, remat=True)

    def loss(params):
        y = scanned(params, X, T, COND)
        return jnp.square(y).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
    np.testing.assert_allclose(y, CALL(apply, params, T, COND), rtol=1e-4, atol=1e-4)
    all_gradients_live(grads)


def test_blocks_of_a_scanned_stack_are_skipped_one_by_one():
    (apply, params), (scanned, stacked) = network(), network(scan=True)
    where = "encoder/1|decoder/0"
    expected = CALL(apply.without_blocks(where), params, T, COND)
    y = CALL(scanned.without_blocks(where), stacked, T, COND)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("told", ["t", "label", "text"])
def test_each_token_is_seen_by_its_own_sample(told):
    apply, params = network()
    y = np.asarray(CALL(apply, params, T, COND))
    t, cond = T.copy(), {name: value.copy() for name, value in COND.items()}
    changed = t if told == "t" else cond[told]
    changed[1] = changed[1] - 1
    moved = np.abs(np.asarray(CALL(apply, params, t, cond)) - y).max(axis=(1, 2, 3))
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() < 1e-5


def test_published_initial_spread():
    _, params = models.init(lambda r: small(r, width=128, num_classes=200), KEY)
    assert np.std(params["middle"]["qkv"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(params["label"]) == pytest.approx(1.0, rel=0.02)  # torch's embedding
    patches = params["embed_patches"]["kernel"]  # torch's convolution: uniform to 1 / sqrt(fan in)
    assert np.abs(patches).max() == pytest.approx(32**-0.5, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 4}, "depth=4 must be odd"),
        ({"image_size": 6}, "image_size=6 must be a multiple of patch=4"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))
    with pytest.raises(ValueError, match="name='XL' is none of .*nearest is 'L'"):
        models.uvit_pixels("XL")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X[:, :4]}, "has learned the positions of that size, not of 4 x 8"),
        ({"cond": COND | {"text": TEXT[:, :1]}}, r"\[3, 2, 6\]; cond not \[3, 1, 6\]"),
        ({"cond": {"label": COND["label"]}}, r"needs cond\['text'\].*has \['label'\]"),
    ],
)
def test_wrong_inputs(inputs, message):
    apply, shapes = models.abstract(small)
    given = {"x": X, "cond": COND} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, given["x"], T, given["cond"])
