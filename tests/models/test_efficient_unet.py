"""Imagen's Efficient U-Net: where its levels run, what its text and its small image may change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models import efficient_unet
from jdiff.models.efficient_unet import EfficientUNet
from jdiff.models.text_attention import PixelAttention, TextPool

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 8, 8, 2)).astype(np.float32)
T = np.asarray([0.1, 0.5, 0.9], np.float32)
TEXT = RANDOM.standard_normal((3, 4, 6)).astype(np.float32)
MASK = np.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]], bool)
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
FIELDS = {
    "in_channels": 2,
    "low_res_channels": 2,
    "widths": (8, 16),
    "blocks": (1, 1),
    "strides": (2, 2),
    "self_attention": (False, True),
    "text_attention": (True, True),
    "heads": 2,
    "text_width": 6,
    "scalars": ("aug_level",),
    "time_scale": 1000.0,
}


def small(rngs, **changes):
    return EfficientUNet(**(FIELDS | changes), rngs=rngs)


def cond(**changes):
    low = np.random.default_rng(2).standard_normal((3, 2, 4, 2)).astype(np.float32)
    given = {"low_res": low, "text": TEXT, "text_mask": MASK}
    return given | {"aug_level": np.asarray([0.2, 0.4, 0.0], np.float32)} | changes


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with every weight random."""
    apply, params = models.init(functools.partial(small, **changes), KEY)
    return jax.jit(apply, compiler_options=QUICK), random(params)


def random(params):
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda w: w + 0.2 * draw.standard_normal(w.shape, np.float32), params)


def test_no_block_runs_at_the_resolution_of_the_image(monkeypatch):
    """Down before the blocks, up after them: the reverse of ADM's order (appendix B)."""
    apply, shapes = models.abstract(functools.partial(small, blocks=(1, 2)))
    seen, run = [], efficient_unet.run
    spy = lambda block, h, *rest, **kwargs: seen.append(h.shape) or run(block, h, *rest, **kwargs)
    monkeypatch.setattr(efficient_unet, "run", spy)
    out = jax.eval_shape(apply, shapes, X, T, cond())
    assert out.shape == X.shape
    # Each level's blocks and its attention; on the way up with the features of the way down.
    assert seen == [
        *[(3, 4, 4, 8)] * 2,
        *[(3, 2, 2, 16)] * 3,
        *[(3, 2, 2, 16)] * 3,
        (3, 4, 4, 16 + 8),
        (3, 4, 4, 8),
    ]


@pytest.mark.parametrize("size", [256, 1024])
def test_published_networks_as_far_as_the_appendix_gives_them(size):
    fields = models.imagen_upsampler(size)
    _, shapes = models.abstract(lambda rngs: EfficientUNet(**fields, rngs=rngs))
    levels = [shapes["encoder"][str(i)] for i in range(4)]
    assert [len(level["blocks"]) for level in levels] == [2, 4, 8, 8]
    widths = [level["resample"]["conv"]["kernel"].shape for level in levels]
    assert widths == [(3, 3, 128, 128), (3, 3, 128, 256), (3, 3, 256, 512), (3, 3, 512, 1024)]
    assert [level.get("attention") is not None for level in levels] == [False, False, False, True]
    attention = levels[3]["attention"]
    assert ("kv" in attention) == (size == 256)
    assert attention["text"]["kv"]["kernel"].shape == (4096, 2 * 2 * 1024)
    assert shapes["stem"]["kernel"].shape == (3, 3, 6, 128)
    total = models.count(shapes)
    assert models.count([levels[3], shapes["decoder"]["0"]]) > 0.75 * total


def test_a_silent_block_scales_its_projected_skip():
    _, params = models.init(small, KEY)
    block = params["encoder"]["1"]["blocks"]["0"]
    assert not np.any(block["conv2"]["kernel"])
    eye = np.eye(16, dtype=np.float32)[None, None]
    params["encoder"]["1"]["blocks"]["0"] = block | {"skip": {"kernel": eye, "bias": jnp.zeros(16)}}
    block = models.abstract(small)[0].merge(params).encoder[1].blocks[0]
    h = RANDOM.standard_normal((2, 2, 2, 16)).astype(np.float32)
    y = jax.jit(lambda h: block(h, jnp.ones((2, 32)), None))(h)
    np.testing.assert_allclose(y, math.sqrt(0.5) * h, rtol=1e-6)


def test_output_starts_at_zero():
    _, params = models.init(small, KEY)
    assert not np.any(params["out"]["kernel"])
    assert not np.any(params["encoder"]["1"]["attention"]["project"]["kernel"])


@pytest.mark.parametrize("to_pixels", [True, False])
def test_pixels_and_tokens_share_one_softmax(to_pixels):
    """Without queries all places count alike: the mean over pixels, if any, and unmasked tokens."""

    def build(rngs):
        fields = {"to_pixels": to_pixels, "text_width": 6, "scale": 0.5, "eps": 1e-5}
        return PixelAttention(4, 2, **fields, dtype=jnp.float32, rngs=rngs)

    apply, shapes = models.abstract(build)
    params = random(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes))
    params["q"] = jax.tree.map(jnp.zeros_like, params["q"])
    h = RANDOM.standard_normal((3, 2, 3, 4)).astype(np.float32)

    @jax.jit
    def of(params):
        module = apply.merge(params)
        value = lambda kv, a: kv(a)[..., 8:].reshape(3, -1, 8)
        values, seen = [value(module.text.kv, module.text.norm(TEXT))], [MASK]
        if to_pixels:
            values.insert(0, value(module.kv, module.norm(h)))
            seen.insert(0, np.ones((3, 6), bool))
        values, seen = jnp.concatenate(values, axis=1), np.concatenate(seen, axis=1)[..., None]
        mean = (values * seen).sum(axis=1) / seen.sum(axis=1)
        expected = 0.5 * (h + module.project(mean)[:, None, None])
        return module(h, TEXT, jnp.asarray(MASK)), expected

    np.testing.assert_allclose(*of(params), rtol=1e-5, atol=1e-6)


def test_masked_tokens_are_not_seen_and_their_order_does_not_matter():
    apply, params = network()
    y = np.asarray(apply(params, X, T, cond()))
    other = np.where(MASK[..., None], TEXT, 100.0)
    np.testing.assert_allclose(apply(params, X, T, cond(text=other)), y, rtol=1e-4, atol=1e-5)
    turned = cond(text=TEXT[:, ::-1], text_mask=MASK[:, ::-1])
    np.testing.assert_allclose(apply(params, X, T, turned), y, rtol=1e-4, atol=1e-5)
    all_seen = cond(text_mask=np.ones_like(MASK))
    without = {name: value for name, value in all_seen.items() if name != "text_mask"}
    np.testing.assert_allclose(
        apply(params, X, T, without), apply(params, X, T, all_seen), rtol=1e-4, atol=1e-5
    )
    # A text of which nothing is seen, as guidance's null condition may be, has an output too.
    assert np.isfinite(apply(params, X, T, cond(text_mask=np.zeros_like(MASK)))).all()


def test_pooled_text_is_a_weighted_mean_of_its_tokens():
    apply, shapes = models.abstract(lambda rngs: TextPool(6, 8, 2, rngs=rngs))
    params = random(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes))
    params["norm"]["scale"] += 1.0

    @jax.jit
    def of(params, text):
        pool, picks = apply.merge(params), jnp.eye(4, dtype=bool)[:3]
        values = pool.out(jnp.split(pool.kv(pool.norm(text)), 2, axis=-1)[1])
        return pool(text[:, :1], None), pool(text, picks), values

    alone, picked, values = of(params, TEXT)
    np.testing.assert_allclose(alone, values[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(picked, values[np.arange(3), np.arange(3)], rtol=1e-5, atol=1e-6)


def test_each_condition_reaches_its_sample_and_no_other():
    apply, params = network()
    y = np.asarray(apply(params, X, T, cond()))
    second = np.asarray([0, 1, 0], np.float32)
    others = X + second[:, None, None, None]
    low = cond()["low_res"] + second[:, None, None, None]
    for x, t, given in (
        (others, T, cond()),
        (X, T + 0.2 * second, cond()),
        (X, T, cond(low_res=low)),
        (X, T, cond(aug_level=cond()["aug_level"] + 0.3 * second)),
        (X, T, cond(text=TEXT * (1 - second[:, None, None]))),
    ):
        moved = np.abs(np.asarray(apply(params, x, t, given)) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-3
        assert moved[[0, 2]].max() < 1e-4


def test_every_weight_gets_a_gradient(all_gradients_live):
    params, (apply, _) = network()[1], models.abstract(small)
    loss = jax.grad(lambda p: jnp.square(apply(p, X, T, cond()) - X).sum())
    all_gradients_live(jax.jit(loss, compiler_options=QUICK)(params))


def test_bfloat16_is_close_and_keeps_the_embedding_exact():
    exact, params = network()
    rough, _ = network(dtype="bfloat16")
    y, z = (f(params, X, T, cond()) for f in (exact, rough))
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1


def test_a_level_need_not_change_the_resolution():
    changes = {"strides": (1, 2), "text_attention": (False, False), "text_width": 0}
    apply, shapes = models.abstract(functools.partial(small, **changes))
    given = cond(low_res=cond()["low_res"][:, :, :2])
    out = jax.eval_shape(apply, shapes, X[:, :6, :2], T, given)
    assert out.shape == (3, 6, 2, 2)
    assert "resample" not in shapes["encoder"]["0"]
    assert "pool" not in shapes


def test_dropout_takes_a_key_for_each_block(monkeypatch):
    apply, shapes = models.abstract(functools.partial(small, dropout=0.5))
    keys = []
    monkeypatch.setattr(efficient_unet.layers, "dropout", lambda x, rate, k: keys.append(k) or x)
    jax.eval_shape(lambda p, key: apply(p, X, T, cond(), key=key), shapes, KEY)
    assert len({id(key) for key in keys}) == len(keys) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1,)}, r"blocks=\(1,\) has 1 entries, not one for each of the 2 widths"),
        ({"strides": (2, 3)}, r"strides=\(2, 3\) must be 1 or 2"),
        ({"widths": ()}, r"widths=\(\) must be whole numbers"),
        ({"text_width": 0}, r"text_attention=\(True, True\) needs a text_width"),
        ({"heads": 3}, "heads=3 does not divide"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": TEXT[..., :5]}, r"takes cond\['text'\] of shape \[3, L, 6\], not \[3, 4, 5\]"),
        ({"text_mask": MASK[:, :3]}, r"cond\['text_mask'\] of shape \[3, 4\], not \[3, 3\]"),
        ({"aug_level": T[:2]}, r"cond\['aug_level'\] has shape \[2\]"),
        ({"low_res": X[..., :1]}, r"takes cond\['low_res'\] of shape \[3, h, w, 2\]"),
    ],
)
def test_wrong_inputs(changes, message):
    apply, shapes = models.abstract(small)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, X, T, cond(**changes))
    with pytest.raises(ValueError, match=r"divisible by 4 \(its strides divide the image\)"):
        jax.eval_shape(apply, shapes, X[:, :6], T, cond())
