"""The text-conditional U-Net: published counts, its transformer in closed form, its conditions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jdiff import models
from jdiff.models import cond_unet_blocks, replace
from jdiff.models.attention import Attention

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def numbers(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


FIELDS = {
    "in_channels": 2,
    "low_res_channels": 3,
    "widths": (8, 16),
    "blocks": 1,
    "depths": (0, 2),
    "heads": (2, 4),
    "text_width": 6,
    "added_width": 5 + 2 * 4,
    "added_channels": 4,
    "num_classes": 4,
    "guidance_channels": 4,
    "groups": 2,
    "projection": "linear",
}
X, T = numbers(3, 4, 8, 2), np.asarray([3.0, 0.2, 900.0], np.float32)
COND = {
    "text": numbers(3, 5, 6),
    "text_mask": np.ones((3, 5), bool),
    "low_res": numbers(3, 2, 4, 3),
    "pooled": numbers(3, 5),
    "time_ids": np.float32([[512, 0], [256, 64], [512, 32]]),
    "label": np.asarray([1, 3, 0], np.int32),
    "guidance": np.float32([1.5, 2.0, 7.5]),
}


def small(rngs, **changes):
    return models.CondUNet(**(FIELDS | changes), rngs=rngs)


def stacked(params):
    """The same weights with scan=True: lists of transformer blocks become single trees."""
    if not isinstance(params, dict):
        return params
    changed = {name: stacked(child) for name, child in params.items()}
    if "project_in" in params:
        blocks = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
        changed["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return changed


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.abstract(functools.partial(small, **changes))
    _, params = models.init(small, KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.1 * random.standard_normal(w.shape, np.float32), params)
    return jax.jit(apply), stacked(params) if changes.get("scan") else params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (models.sd15(), 859_520_964),
        (models.sd15(scalars=("t-s",)), 859_520_964 + 1281 * 1280 + 321 * 1280),
        (models.sd2(), 865_910_724),
        (models.sdxl(), 2_567_463_684),
    ],
)
def test_published_parameter_counts(fields, expected, scan):
    _, shapes = models.abstract(lambda rngs: models.CondUNet(**fields, scan=scan, rngs=rngs))
    assert models.count(shapes) == expected


@pytest.mark.parametrize("projection", ["conv", "linear"])
def test_transformers_start_as_the_identity(projection):
    common = {"heads": 2, "projection": projection, "groups": 2, "dtype": jnp.float32}
    build = functools.partial(cond_unet_blocks.SpatialTransformer, 8, 6, 2, **common)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    x = numbers(2, 3, 4, 8)
    run = jax.jit(lambda p, x: apply.merge(p)(x, COND["text"][:2], None))
    np.testing.assert_array_equal(run(params, x), x)
    moved = params | {"project_out": jax.tree.map(jnp.ones_like, params["project_out"])}
    assert np.abs(run(moved, x) - x).max() > 0.1


def test_output_and_residual_branches_start_at_zero():
    _, params = models.init(small, KEY)
    blocks = [*params["encoder"]["0"]["blocks"].values(), *params["middle"]["blocks"].values()]
    for layer in (params["out_conv"], *(block["conv2"] for block in blocks)):
        assert not any(np.any(leaf) for leaf in layer.values())
    assert np.std(params["label"]) == pytest.approx(1.0, abs=0.2)
    # PyTorch's default: uniform with variance 1 / (3 fan_in).
    first = params["middle"]["transformers"]["0"]["blocks"]["0"]["mlp1"]["kernel"]
    assert np.std(first) == pytest.approx((1 / (3 * 16)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("cross_only", [False, True])
def test_a_block_attends_to_itself_then_to_text_then_gates(cross_only):
    """The transformer block against the formula written out in numpy, token by token."""
    width, heads, text = 8, 2, COND["text"][:2]
    build = functools.partial(
        cond_unet_blocks.TransformerBlock, width, 6, heads=heads, cross_only=cross_only
    )
    apply, params = models.init(lambda rngs: build(dtype=jnp.float32, rngs=rngs), KEY)
    params = jax.tree.map(lambda w: numbers(*w.shape) * 0.5, params)
    h, mask = numbers(2, 3, width), np.asarray([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]], bool)
    y = jax.jit(lambda p: apply.merge(p)(h, text, mask[:, None, None, :]))(params)

    def norm(p, v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * p["scale"] + p["bias"]

    def attend(p, v, context, seen):
        q, k, u = v @ p["q"]["kernel"], context @ p["k"]["kernel"], context @ p["v"]["kernel"]
        parts = []
        for cut in (slice(0, width // heads), slice(width // heads, width)):
            logits = np.einsum("bqc,bkc->bqk", q[..., cut], k[..., cut]) / np.sqrt(width // heads)
            logits = np.where(seen[:, None, :], logits, -np.inf)
            parts.append(scipy.special.softmax(logits, axis=-1) @ u[..., cut])
        return np.concatenate(parts, axis=-1) @ p["project"]["kernel"] + p["project"]["bias"]

    v = norm(params["norm1"], h)
    context, seen = (text, mask) if cross_only else (v, np.ones((2, 3), bool))
    h = h + attend(params["self_attention"], v, context, seen)
    h = h + attend(params["cross_attention"], norm(params["norm2"], h), text, mask)
    v = norm(params["norm3"], h) @ params["mlp1"]["kernel"] + params["mlp1"]["bias"]
    gate = v[..., 4 * width :]
    v = v[..., : 4 * width] * gate * 0.5 * (1 + scipy.special.erf(gate / np.sqrt(2)))
    h = h + v @ params["mlp2"]["kernel"] + params["mlp2"]["bias"]
    np.testing.assert_allclose(y, h, rtol=1e-4, atol=1e-4)


def test_samples_do_not_see_each_other_and_see_every_condition():
    apply, params = network()
    y = np.asarray(apply(params, X, T, COND))
    assert y.shape == X.shape
    assert y.dtype == np.float32
    changed = {
        name: (X, T, COND | {name: np.where(_second(value), other(value), value)})
        for name, value in COND.items()
    }
    changed["x"] = (np.where(_second(X), X + 1, X), T, COND)
    changed["t"] = (X, np.where(_second(T), T + 0.5, T), COND)
    for name, inputs in changed.items():
        moved = np.abs(np.asarray(apply(params, *inputs)) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-4, name
        assert moved[[0, 2]].max() < 1e-5, name


def _second(value):
    return (np.arange(3) == 1).reshape(3, *(1,) * (value.ndim - 1))


def other(value):
    """Another valid value of a condition."""
    if value.dtype == bool:
        return np.arange(value.shape[1]) < 2
    return (value + 1) % 4 if value.dtype == np.int32 else value + np.float32(1)


def test_text_that_is_masked_has_no_effect_and_an_absent_mask_hides_nothing():
    apply, params = network()
    mask = np.asarray([[1, 1, 1, 0, 0]] * 3, bool)
    text = np.where(mask[..., None], COND["text"], 7.0).astype(np.float32)
    y = apply(params, X, T, COND | {"text_mask": mask})
    z = apply(params, X, T, COND | {"text_mask": mask, "text": text})
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)
    without = {name: value for name, value in COND.items() if name != "text_mask"}
    y = apply(params, X, T, COND)
    np.testing.assert_allclose(apply(params, X, T, without), y, rtol=1e-4, atol=1e-5)


def test_null_label_adds_nothing():
    apply, params = network()
    null = np.full(3, 4, np.int32)
    silent = params | {"label": np.zeros_like(params["label"])}
    y = apply(params, X, T, COND | {"label": null})
    np.testing.assert_allclose(y, apply(silent, X, T, COND), rtol=1e-5, atol=1e-6)
    assert np.abs(y - apply(params, X, T, COND)).max() > 1e-3


def test_scan_and_remat_change_no_number_and_every_weight_gets_a_gradient(all_gradients_live):
    (apply, params), (other, weights) = network(), network(scan=True, remat=True)

    def loss(p):
        y = other(p, X, T, COND)
        return jnp.square(y - X).sum(), y

    differentiate = jax.value_and_grad(loss, has_aux=True)
    program = str(jax.make_jaxpr(differentiate)(weights))
    assert "remat" in program
    assert "scan[" in program
    (_, y), grads = jax.jit(differentiate)(weights)
    np.testing.assert_allclose(y, apply(params, X, T, COND), rtol=1e-4, atol=1e-5)
    all_gradients_live(grads)


def test_bfloat16_is_close_and_keeps_the_conditions_exact():
    apply, params = network()
    rough, _ = network(dtype="bfloat16")
    y, z = apply(params, X, T, COND), rough(params, X, T, COND)
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    apply, shapes = models.abstract(functools.partial(small, dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    embed = jax.eval_shape(lambda p: apply.merge(p).embed(jnp.asarray(T), COND), shapes)
    assert embed.dtype == jnp.float32


def test_every_attention_can_be_replaced_and_blocks_skipped():
    apply, shapes = models.abstract(small)
    found = replace.find(apply.skeleton(), kind=Attention)
    # Two attentions a block: two blocks in the encoder, one in the middle, four in the decoder.
    assert len(found) == 2 * (2 + 1 + 4)
    where = "decoder/0/transformers/0/blocks/1/cross_attention"
    assert f"{where}/attention" in found
    seen = []

    def kernel(q, k, v, *, mask=None):
        seen.append((q.shape, k.shape, mask.shape))
        return q

    changed = apply.with_attention(kernel, where)
    jax.eval_shape(changed, shapes, X, T, COND)
    assert seen == [((3, 2, 4, 4, 4), (3, 5, 4, 4), (3, 1, 1, 5))]
    jax.eval_shape(apply.without_blocks("middle/transformers"), shapes, X, T, COND)


def test_weights_name_their_axes():
    axes = models.axes(functools.partial(small, scan=True))
    block = axes["middle"]["transformers"]["0"]["blocks"]
    assert block["self_attention"]["k"]["kernel"] == ("layers", "embed", "heads")
    assert block["cross_attention"]["k"]["kernel"] == ("layers", "text", "heads")
    assert block["cross_attention"]["project"]["kernel"] == ("layers", "heads", "embed")
    assert block["mlp2"]["kernel"] == ("layers", "mlp", "embed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": "lin"}, "projection 'lin' is not known. Did you mean 'linear'"),
        ({"depths": (1,)}, r"depths=\(1,\) has 1 entries, not one for each of the 2 widths"),
        ({"depths": (-1, 1)}, r"depths=\(-1, 1\) must not be negative"),
        ({"heads": (2, 3)}, "heads=3 does not divide the width of its level=16"),
        ({"groups": 3}, "groups=3 does not divide channels=8"),
        ({"middle_depth": 0}, "middle_depth=0 must be positive"),
        ({"widths": ()}, r"widths=\(\) must be whole numbers"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


@pytest.mark.parametrize(
    ("entry", "given", "message"),
    [
        ("text", None, r"CondUNet needs cond\['text'\] of shape \[3, L, 6\]; cond has \["),
        ("text", X, r"takes cond\['text'\] of shape \[3, L, 6\], not \[3, 4, 8, 2\]"),
        ("text_mask", np.ones((3, 4), bool), r"'text_mask'\] of shape \[3, 5\], not \[3, 4\]"),
        ("low_res", X, r"cond\['low_res'\] of shape \[3, h, w, 3\], not \[3, 4, 8, 2\]"),
        ("pooled", T, r"cond\['pooled'\] of shape \[3, P\], not \[3\]"),
        ("time_ids", COND["pooled"], r"added_width=13, but .*make 5 \+ 5 \* 4"),
        ("guidance", None, r"needs cond\['guidance'\] of shape \[3\]"),
        ("label", None, r"num_classes=4 needs cond\['label'\]"),
    ],
)
def test_wrong_conditions(entry, given, message):
    apply, shapes = models.abstract(small)
    cond = {name: value for name, value in COND.items() if name != entry}
    cond |= {} if given is None else {entry: given}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, X, T, cond)
