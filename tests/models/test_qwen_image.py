"""Qwen-Image: the released count, where its tokens are, padded texts, scanned against unrolled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models.qwen_image import positions

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 4, 6, 2)).astype(np.float32)
T = np.asarray([0.9, 0.3], np.float32)
TEXT = RANDOM.standard_normal((2, 3, 6)).astype(np.float32)
MASK = np.asarray([[True, True, True], [True, False, True]])
COND = {"text": TEXT, "text_mask": MASK}
FIELDS = {"in_channels": 2, "width": 24, "depth": 2, "heads": 2, "text_width": 6}
FIELDS |= {"rope_dims": (4, 4, 4)}


def small(rngs, **changes):
    return models.QwenImage(**(FIELDS | changes), rngs=rngs)


@functools.cache
def weights():
    _, params = models.init(small, KEY)
    random = np.random.default_rng(1)
    noise = lambda w: np.asarray(w) + 0.2 * random.standard_normal(w.shape, np.float32)
    return jax.tree.map(noise, params)


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.abstract(functools.partial(small, **changes))
    params = weights()
    return jax.jit(apply), models.stack_blocks(params) if changes.get("scan") else params


@pytest.mark.parametrize("scan", [False, True])
def test_released_parameter_count(scan):
    """diffusers' QwenImageTransformer2DModel with its default config, built on the meta device."""
    fields = models.qwen_image(scan=scan)
    _, shapes = models.abstract(lambda rngs: models.QwenImage(**fields, rngs=rngs))
    assert models.count(shapes) == 20_430_401_088


def test_starts_at_zero():
    apply, _ = network()
    _, params = models.init(small, KEY)
    np.testing.assert_array_equal(apply(params, X, T, COND), np.zeros_like(X))


@pytest.mark.parametrize(
    ("side", "first"), [(1, -1), (2, -1), (3, -2), (4, -2), (5, -3), (64, -32)]
)
def test_the_image_is_counted_from_its_middle(side, first):
    image, _ = positions(side, 2, 0)
    np.testing.assert_array_equal(image[::2, 1], np.arange(first, first + side))
    image, _ = positions(2, side, 0)
    np.testing.assert_array_equal(image[:side, 2], np.arange(first, first + side))
    np.testing.assert_array_equal(image[:, 0], 0)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (6, 4), (3, 7), (1, 1)])
def test_the_text_is_on_the_diagonal_beyond_the_image(rows, columns):
    image, text = positions(rows, columns, 5)
    assert image.shape == (rows * columns, 3)
    np.testing.assert_array_equal(text, text[:, :1] * np.ones(3))
    np.testing.assert_array_equal(text[:, 0], image[:, 1:].max() + 1 + np.arange(5))


def test_a_larger_image_keeps_the_places_of_the_smaller():
    small, _ = positions(4, 6, 0)
    large, _ = positions(8, 8, 0)
    assert {tuple(p) for p in small} < {tuple(p) for p in large}


def test_scanned_it_is_the_same_and_every_weight_that_the_image_sees_gets_a_gradient(
    all_gradients_live,
):
    """The gradient of the scanned network, which is quicker to compile, with remat."""
    apply, params = network(scan=True, remat="dots")

    def loss(p):
        y = apply(p, X, T, COND)
        return jnp.square(y - X).sum(), y

    (_, z), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    plain, params = network()
    y = plain(params, X, T, COND)
    assert y.shape == X.shape
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    grads = named(models.unstack_blocks(grads))
    # Of the last block's text, the image sees the keys and values alone.
    unseen = re.compile(r"blocks/1/text/(project|mlp1|mlp2|qkv/q|qkv/norm_q)/")
    live = {name: g for name, g in grads.items() if not unseen.match(name)}
    assert len(grads) - len(live) == 9
    all_gradients_live(live)
    assert not any(np.any(g) for name, g in grads.items() if unseen.match(name))


def named(tree):
    return {
        "/".join(part.key for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_scanned_program_does_not_grow_with_depth():
    def size(depth):
        apply, shapes = models.abstract(functools.partial(small, depth=depth, scan=True))
        return str(jax.make_jaxpr(apply)(shapes, X, T, COND)).count("\n")

    assert size(2) == size(9)


def test_masked_text_is_not_seen():
    apply, params = network()
    y = np.asarray(apply(params, X, T, COND))
    text = TEXT.copy()
    text[1, 1] += 10.0
    np.testing.assert_array_equal(apply(params, X, T, COND | {"text": text}), y)
    text[1, 2] += 10.0
    z = np.asarray(apply(params, X, T, COND | {"text": text}))
    assert np.abs(z[1] - y[1]).max() > 1e-2
    np.testing.assert_array_equal(z[0], y[0])


def test_a_padded_text_is_the_text():
    apply, params = network()
    padded = apply(params, X, T, {"text": TEXT, "text_mask": np.asarray([[True, True, False]] * 2)})
    alone = apply(params, X, T, {"text": TEXT[:, :2]})
    np.testing.assert_allclose(padded, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
    assert np.abs(alone - apply(params, X, T, COND)).max() > 1e-2


def test_bfloat16_is_close_and_keeps_time_exact():
    exact, params = network()
    rough, _ = network(dtype="bfloat16")
    y, z = (f(params, X, T, COND) for f in (exact, rough))
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    # 999 and 1000 are one number in bfloat16.
    late = np.asarray([0.999, 1.0], np.float32)
    cond = {"text": TEXT[[0, 0]], "text_mask": MASK[[0, 0]]}
    one, other = np.asarray(rough(params, X[[0, 0]], late, cond))
    assert np.abs(one - other).max() > 1e-3


def test_parameters_name_their_axes():
    block = models.axes(functools.partial(small, scan=True))["blocks"]["text"]
    assert block["qkv"]["q"]["kernel"] == ("layers", "embed", "heads")
    assert block["mlp2"]["kernel"] == ("layers", "mlp", "embed")
    assert models.axes(small)["embed_text"]["kernel"] == ("text", "embed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, r"heads=5 does not divide width=24"),
        ({"rope_dims": (4, 4)}, r"rope_dims=\(4, 4\) sum to 8, a head has 12 channels"),
        ({"rope_dims": (6, 6)}, "must be for frame, row and column"),
        ({"depth": 0}, "depth=0 must be positive"),
        ({"remat": "ful"}, "remat 'ful' is not known. Did you mean 'full'"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X[:, :3]}, r"divisible by 2 \(patch=2\), not 3 x 6; the nearest is 4 x 6"),
        ({"cond": {}}, r"QwenImage needs cond\['text'\] of shape \[2, L, 6\]; cond has \[\]"),
        ({"cond": {"text": TEXT[..., :5]}}, r"cond\['text'\] \[2, L, 6\], not \[2, 3, 5\]"),
        (
            {"cond": {"text": TEXT, "text_mask": MASK.astype(int)}},
            r"cond\['text_mask'\] as bool \[2, 3\].*not int32 \[2, 3\]",
        ),
    ],
)
def test_wrong_inputs(inputs, message):
    apply, shapes = models.abstract(small)
    given = {"x": X, "t": T, "cond": COND} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, given["x"], given["t"], given["cond"])
