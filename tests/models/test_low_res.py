"""The small image of super-resolution: enlarged in closed form, and alike in every network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.errors import UserError
from jdiff.models import low_res
from jdiff.models.flops import flops
from jdiff.models.low_res import METHODS, enlarge, with_low_res

DRAW = np.random.default_rng(0)
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
SMALL = DRAW.standard_normal((2, 5, 3, 2)).astype(np.float32)
SIZES = [(5, 10), (8, 13), (8, 18), (6, 48), (7, 7)]  # of the small and the large image

methods = pytest.mark.parametrize("method", METHODS)
sizes = pytest.mark.parametrize(("h", "large"), SIZES)


def centres(h, large):
    """Those of the large image's pixels in the small one's coordinates, in units of its pixels."""
    return (np.arange(large) + 0.5) * h / large


# In closed form


@methods
@sizes
def test_constants_stay(method, h, large):
    y = enlarge(np.full((1, h, h, 1), 0.7, np.float32), (large, large), method)
    np.testing.assert_allclose(y, np.full((1, large, large, 1), 0.7), rtol=1e-6)


@methods
@sizes
def test_a_linear_ramp(method, h, large):
    """It goes on along the same line, centre by centre; "nearest" takes the pixel it lies in."""
    ramp = np.broadcast_to(np.arange(h)[:, None, None] + 0.5, (h, 2, 1)).astype(np.float32)
    y = np.asarray(enlarge(ramp, (large, 4), method))
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), atol=1e-5)  # flat along W
    u = centres(h, large)
    reach = {"bilinear": 0.5, "bicubic": 1.5, "nearest": 0.0}[method]
    inside = (u >= reach) & (u <= h - reach)
    if method == "nearest":
        expected = np.asarray([(2 * i + 1) * h // (2 * large) + 0.5 for i in range(large)])
    else:
        expected = np.clip(u, 0.5, h - 0.5)  # the border repeats
    assert inside.sum() > large // 3
    np.testing.assert_allclose(y[inside, 0, 0], expected[inside], rtol=1e-5)
    if method == "bilinear":
        np.testing.assert_allclose(y[:, 0, 0], expected, rtol=1e-5)


@sizes
def test_bicubic_is_keys_convolution(h, large):
    """Keys 1981, equation 15, written out; at the border over the pixels that there are."""

    def kernel(s):
        s = np.abs(s)
        near, far = 1.5 * s**3 - 2.5 * s**2 + 1, -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2
        return np.where(s < 1, near, np.where(s < 2, far, 0))

    row = DRAW.standard_normal(h)
    weights = kernel(centres(h, large)[:, None] - (np.arange(h) + 0.5))
    expected = weights @ row / weights.sum(axis=1)
    image = np.broadcast_to(row[None, :, None], (2, h, 1)).astype(np.float32)
    np.testing.assert_allclose(enlarge(image, (2, large), "bicubic")[1, :, 0], expected, atol=1e-5)


@methods
def test_axes_go_alone_and_either_way(method):
    """Each axis by its own factor; mirrored in, mirrored out; batches and channels apart."""
    y = np.asarray(enlarge(SMALL, (10, 12), method))
    rows = enlarge(SMALL, (10, 3), method)
    np.testing.assert_allclose(enlarge(rows, (10, 12), method), y, rtol=1e-5, atol=1e-6)
    flipped = enlarge(SMALL[:, ::-1, ::-1], (10, 12), method)
    np.testing.assert_allclose(np.asarray(flipped)[:, ::-1, ::-1], y, rtol=1e-5, atol=1e-6)
    one = enlarge(SMALL[1, ..., :1], (10, 12), method)
    np.testing.assert_allclose(one, y[1, ..., :1], rtol=1e-6, atol=1e-6)


@methods
def test_the_same_size_is_the_same_image(method):
    np.testing.assert_array_equal(enlarge(SMALL, (5, 3, 2), method), SMALL)


def test_nearest_repeats_pixels():
    y = enlarge(SMALL, (15, 6), "nearest")
    np.testing.assert_array_equal(y, SMALL.repeat(3, axis=1).repeat(2, axis=2))


def test_what_cannot_be_enlarged():
    with pytest.raises(UserError, match=r"low_res_method 'bilinar' .* Did you mean 'bilinear'"):
        enlarge(SMALL, (10, 6), "bilinar")
    with pytest.raises(UserError, match="5 x 3 pixels cannot be enlarged to 10 x 2"):
        enlarge(SMALL, (10, 2))


# In the networks

TEXT = np.zeros((2, 1, 4), np.float32)
LEVEL = np.asarray([0.1, 0.6], np.float32)
COMMON = {"in_channels": 2, "low_res_channels": 3, "scalars": ("aug_level",)}
NETWORKS = {
    "UNet": {"image_size": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1},
    "CondUNet": {
        "widths": (8, 8), "blocks": 1, "depths": (0, 1), "heads": (1, 1), "text_width": 4,
        "groups": 4,
    },
    "EfficientUNet": {
        "widths": (8, 8), "blocks": (1, 1), "strides": (2, 2), "self_attention": (False, True),
        "text_attention": (False, False), "heads": 2,
    },
    "DiT": {"width": 16, "depth": 1, "heads": 2},
    "UntiedDiT": {"width": 16, "depth": 1, "heads": 2, "num_classes": 2},
    "JiT": {"patch": 4, "bottleneck": 6, "width": 16, "depth": 1, "heads": 2},
    "UViT": {"image_size": 8, "patch": 4, "width": 16, "depth": 3, "heads": 2},
}  # fmt: skip
networks = pytest.mark.parametrize("name", NETWORKS)


def build(name, **changes):
    fields = COMMON | NETWORKS[name] | changes
    if name == "UntiedDiT":
        del fields["scalars"]
    return functools.partial(getattr(models, name), **fields)


def abstract(name, **changes):
    made = build(name, **changes)
    return models.abstract(lambda rngs: made(rngs=rngs))


def cond(low):
    label = np.zeros(2, np.int32)
    return {"low_res": low, "aug_level": LEVEL, "text": TEXT, "label": label}


@networks
def test_each_network_enlarges_by_any_factor_as_its_field_says(name, monkeypatch):
    calls = []
    spy = lambda small, shape, method: (
        calls.append((*shape, method)) or enlarge(small, shape, method)
    )
    monkeypatch.setattr(low_res, "enlarge", spy)
    x, t = np.zeros((2, 8, 8, 2), np.float32), np.ones(2, np.float32)
    for method, side in (("bilinear", 4), ("bicubic", 5), ("nearest", 8)):
        apply, shapes = abstract(name, low_res_method=method)
        low = np.zeros((2, side, 3, 3), np.float32)
        assert jax.eval_shape(apply, shapes, x, t, cond(low)).shape == x.shape
    assert calls == [(8, 8, "bilinear"), (8, 8, "bicubic"), (8, 8, "nearest")]
    with pytest.raises(UserError, match="low_res_method 'cubic' .* Did you mean 'bicubic'"):
        abstract(name, low_res_method="cubic")


@networks
def test_the_condition_costs_its_channels_in_the_first_layer(name):
    """And nothing else, whatever the method; without it nothing is there."""
    count = lambda **changes: models.count(abstract(name, **changes)[1])
    first = {"UNet": 9 * 8, "CondUNet": 9 * 8, "EfficientUNet": 9 * 8}
    first |= {"DiT": 4 * 16, "UntiedDiT": 4 * 16, "JiT": 16 * 6, "UViT": 16 * 16}
    without = count(low_res_channels=0)
    assert count() - without == 3 * first[name]
    assert count(low_res_method="nearest") == count()
    axes = models.axes(lambda rngs: build(name)(rngs=rngs))  # of every parameter, still
    is_axes = lambda names: isinstance(names, tuple)
    dimensions = jax.tree.map(len, axes, is_leaf=is_axes)
    assert dimensions == jax.tree.map(lambda s: len(s.shape), abstract(name)[1])


@networks
def test_missing_misshapen_or_too_large(name):
    apply, shapes = abstract(name)
    x, t = np.zeros((2, 8, 8, 2), np.float32), np.ones(2, np.float32)
    run = lambda low: jax.eval_shape(apply, shapes, x, t, cond(low))
    with pytest.raises(ValueError, match=r"takes cond\['low_res'\] of shape \[2, h, w, 3\], not"):
        run(x)
    with pytest.raises(ValueError, match="16 x 4 pixels cannot be enlarged to 8 x 8"):
        run(np.zeros((2, 16, 4, 3), np.float32))
    without = {key: value for key, value in cond(x).items() if key != "low_res"}
    with pytest.raises(ValueError, match=rf"{name} needs cond\['low_res'\] of shape \[2, h, w, 3"):
        jax.eval_shape(apply, shapes, x, t, without)


X = DRAW.standard_normal((2, 8, 8, 2)).astype(np.float32)
T = np.asarray([0.2, 0.9], np.float32)


@pytest.mark.parametrize("name", ["DiT", "JiT", "UViT"])
def test_low_res_is_as_good_as_channels_of_x(name):
    """Enlarged, it is what x's own channels would be; and its level reaches its own sample."""
    low = DRAW.standard_normal((2, 4, 5, 3)).astype(np.float32)
    narrow, shapes = abstract(name, low_res_method="bicubic")
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda w: 0.2 * draw.standard_normal(w.shape, np.float32), shapes)
    narrow = jax.jit(narrow, compiler_options=QUICK)
    wide, _ = abstract(name, in_channels=5, out_channels=2, low_res_channels=0)
    both = np.concatenate([X, enlarge(low, (8, 8), "bicubic")], axis=-1)
    y = np.asarray(narrow(params, X, T, cond(low)))
    expected = jax.jit(wide, compiler_options=QUICK)(params, both, T, cond(low))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(y).max())
    louder = cond(low) | {"aug_level": LEVEL + np.asarray([0, 3.0], np.float32)}
    moved = np.abs(np.asarray(narrow(params, X, T, louder)) - y).max(axis=(1, 2, 3))
    assert moved[1] > 1e-3 and moved[0] < 1e-5


def test_a_level_is_a_token_of_uvit_and_two_layers_of_dit():
    count = lambda name, scalars: models.count(abstract(name, scalars=scalars)[1])
    assert count("UViT", ("aug_level",)) - count("UViT", ()) == 16  # its place
    assert count("DiT", ("aug_level",)) - count("DiT", ()) == (256 + 1) * 16 + (16 + 1) * 16
    apply, shapes = abstract("UViT")
    without = {key: value for key, value in cond(X[..., :1]).items() if key != "aug_level"}
    low = {"low_res": np.zeros((2, 4, 4, 3), np.float32)}
    with pytest.raises(ValueError, match=r"scalars=\('aug_level',\): it needs cond\['aug_level'\]"):
        jax.eval_shape(apply, shapes, X, T, without | low)


def test_operations_grow_by_those_of_the_first_layer():
    """2 a multiply-add: 16 tokens of 4 pixels and 3 channels more, to a width of 16."""
    operations = []
    for channels in (0, 3):
        apply, shapes = abstract("DiT", low_res_channels=channels)
        operations.append(flops(apply, shapes, X, T, cond(np.zeros((2, 8, 8, 3), np.float32))))
    assert operations[1] - operations[0] == 2 * 2 * 16 * (4 * 3) * 16


def test_half_precision_enlarges_in_full():
    """The small image's own precision, then that of x."""
    apply, _ = abstract("DiT")
    low = DRAW.standard_normal((2, 4, 4, 3)).astype(np.float32)
    y = with_low_res(apply.skeleton(), jnp.asarray(X, jnp.bfloat16), {"low_res": low}, 3)
    assert y.dtype == jnp.bfloat16
    expected = enlarge(low, (8, 8)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y[..., 2:].astype(np.float32), expected.astype(np.float32))


def test_bilinear_is_what_it_was():
    """The same numbers as before there was a choice, so that weights trained then still fit."""
    before = jax.image.resize(SMALL, (2, 8, 12, 2), method="bilinear")
    np.testing.assert_array_equal(enlarge(SMALL, (8, 12)), before)
