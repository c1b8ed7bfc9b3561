"""Z-Image: the released count, its block, where text and image sit, the direction of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models.z_image import Block, image_positions, seats

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 4, 6, 2)).astype(np.float32)
T = np.asarray([0.9, 0.3], np.float32)
TEXT = RANDOM.standard_normal((2, 33, 6)).astype(np.float32)
MASK = np.arange(33) < np.asarray([[33], [3]])
COND = {"text": TEXT, "text_mask": MASK}
FIELDS = {"in_channels": 2, "width": 24, "depth": 2, "refiners": 1, "heads": 2, "text_width": 6}
FIELDS |= {"rope_dims": (4, 4, 4)}
STACKS = ("image_blocks", "text_blocks", "blocks")


def small(rngs, **changes):
    return models.ZImage(**(FIELDS | changes), rngs=rngs)


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
    return jax.jit(apply), models.stack_blocks(params, STACKS) if changes.get("scan") else params


@pytest.mark.parametrize("scan", [False, True])
def test_released_parameter_count(scan):
    """diffusers' ZImageTransformer2DModel with its default config, built on the meta device."""
    fields = models.z_image(scan=scan)
    _, shapes = models.abstract(lambda rngs: models.ZImage(**fields, rngs=rngs))
    assert models.count(shapes) == 6_154_908_736


def test_starts_at_zero():
    apply, _ = network()
    _, params = models.init(small, KEY)
    np.testing.assert_array_equal(apply(params, X, T, COND), np.zeros_like(X))
    # The checkpoints predict data - noise: their bias comes out negated.
    params["out"]["bias"] = np.arange(8, dtype=np.float32)
    y = apply(params, X, T, COND)
    np.testing.assert_array_equal(y[:, ::2, ::2], np.broadcast_to([0.0, -1.0], (2, 2, 3, 2)))


def test_time_runs_backwards_inside():
    """At t = 1 the inner time is 0, whatever it is scaled by."""
    one, params = network()
    other, _ = network(time_scale=10.0)
    for t, same in ((np.ones(2, np.float32), True), (T, False)):
        difference = one(params, X, t, COND) - other(params, X, t, COND)
        assert (np.abs(difference).max() < 1e-5) == same


@pytest.mark.parametrize("condition", [0, 5])
def test_block_is_the_formula(condition):
    """Norms before and behind both branches, scales and tanh gates, SwiGLU, written in numpy."""
    fields = {"qk_norm": True, "eps": 1e-2, "dtype": jnp.float32}
    build = functools.partial(Block, 8, 2, condition, **fields)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    h = RANDOM.standard_normal((2, 5, 8)).astype(np.float32)
    c = RANDOM.standard_normal((2, condition)).astype(np.float32) if condition else None
    mask = np.asarray([[True] * 5, [True, True, False, True, False]])
    angles = RANDOM.uniform(-3, 3, (2, 5, 2)).astype(np.float32)
    run = jax.jit(lambda p: apply.merge(p)(h, c, mask[:, None, None], angles))
    if condition:
        np.testing.assert_array_equal(run(params), h)
    params = jax.tree.map(
        lambda w: w + 0.5 * RANDOM.standard_normal(w.shape).astype(np.float32), params
    )

    def linear(name, v):
        p = functools.reduce(lambda tree, part: tree[part], name.split("/"), params)
        return v @ p["kernel"] + p.get("bias", 0)

    def norm(name, v, eps=1e-2):
        scale = functools.reduce(lambda tree, part: tree[part], name.split("/"), params)["scale"]
        return v / np.sqrt(np.square(v).mean(-1, keepdims=True) + eps) * scale

    def per_head(name, v):
        v = linear(f"qkv/{name}", v).reshape(2, 5, 2, 4)
        if name == "v":
            return v
        v = norm(f"qkv/norm_{name}", v, 1e-5)
        z = (v[..., ::2] + 1j * v[..., 1::2]) * np.exp(1j * angles)[:, :, None]
        return np.stack([z.real, z.imag], -1).reshape(v.shape)

    def attend(v):
        q, k, v = (per_head(name, v) for name in "qkv")
        weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2.0) * mask[:, None, None]
        weights /= weights.sum(-1, keepdims=True)
        return linear("project", np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 5, 8))

    scale1, gate1, scale2, gate2 = (0, np.inf, 0, np.inf)
    if condition:
        scale1, gate1, scale2, gate2 = np.split(linear("modulation", c)[:, None], 4, -1)
    expected = h + np.tanh(gate1) * norm("norm2", attend(norm("norm1", h) * (1 + scale1)))
    y = norm("norm3", expected) * (1 + scale2)
    gate = linear("mlp_gate", y)
    y = linear("mlp_out", gate / (1 + np.exp(-gate)) * linear("mlp_in", y))
    expected = expected + np.tanh(gate2) * norm("norm4", y)
    np.testing.assert_allclose(run(params), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("length", "filled"), [(1, 32), (31, 32), (32, 32), (33, 64)])
def test_a_text_is_filled_up_and_numbered_from_one(length, filled):
    text, number, frame, seen = seats(None, length)
    np.testing.assert_array_equal(text, [np.arange(filled) < length])
    np.testing.assert_array_equal(number, [np.arange(1, filled + 1)])
    np.testing.assert_array_equal(frame, [filled + 1])
    assert seen is None


def test_texts_of_different_lengths_sit_in_one_array():
    mask = np.arange(40) < np.asarray([[40], [3], [32], [0]])
    mask[3, [5, 9, 33]] = True
    text, number, frame, seen = map(np.asarray, seats(jnp.asarray(mask), 40))
    np.testing.assert_array_equal(text[:, :40], mask)
    np.testing.assert_array_equal(frame, [65, 33, 33, 33])
    np.testing.assert_array_equal(seen.sum(-1), [64, 32, 32, 32])
    for b in range(4):
        # Tokens first, then what fills up: each number once, in order; what is seen goes before.
        np.testing.assert_array_equal(number[b, text[b]], 1 + np.arange(text[b].sum()))
        assert sorted(number[b]) == list(range(1, 65))
        assert number[b, seen[b]].max() == frame[b] - 1
        assert seen[b, text[b]].all()


def test_the_image_is_a_frame_behind_the_text():
    places = image_positions(jnp.asarray([33.0, 65.0]), 2, 3, 32)
    assert places.shape == (2, 32, 3)
    np.testing.assert_array_equal(places[:, :6, 0], [[33] * 6, [65] * 6])
    np.testing.assert_array_equal(places[1, :6, 1], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(places[1, :6, 2], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(places[:, 6:], 0)


def test_a_padded_text_is_the_text():
    apply, params = network()
    y = np.asarray(apply(params, X, T, COND))
    alone = np.asarray(apply(params, X, T, {"text": TEXT[:, :3]}))
    whole = np.asarray(apply(params, X, T, {"text": TEXT}))
    for b, same, other in ((0, whole, alone), (1, alone, whole)):
        np.testing.assert_allclose(y[b], same[b], rtol=1e-4, atol=1e-4 * np.abs(y).max())
        assert np.abs(y[b] - other[b]).max() > 1e-2
    # Neither what is masked nor where the gaps are makes a difference.
    moved = np.where(MASK[..., None], TEXT, 100.0)
    mask = MASK.copy()
    moved[1, [0, 20, 32]], mask[1] = TEXT[1, :3], False
    mask[1, [0, 20, 32]] = True
    z = apply(params, X, T, {"text": moved, "text_mask": mask})
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_an_empty_text_is_no_text():
    apply, params = network()
    empty = MASK & [[True], [False]]
    y = apply(params, X, T, {"text": TEXT, "text_mask": empty})
    z = apply(params, X, T, {"text": TEXT + 3 * ~empty[..., None], "text_mask": empty})
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y, z)


def test_scanned_it_is_the_same_and_every_weight_gets_a_gradient(all_gradients_live):
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
    all_gradients_live(grads)


def test_scanned_program_does_not_grow_with_depth():
    def size(depth, refiners):
        changes = {"depth": depth, "refiners": refiners, "scan": True}
        apply, shapes = models.abstract(functools.partial(small, **changes))
        return str(jax.make_jaxpr(apply)(shapes, X, T, COND)).count("\n")

    assert size(2, 1) == size(9, 4)


def test_bfloat16_is_close_and_keeps_time_exact():
    exact, params = network()
    rough, _ = network(dtype="bfloat16")
    y, z = (f(params, X, T, COND) for f in (exact, rough))
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    # 999 and 1000 are one number in bfloat16.
    late = np.asarray([0.0, 0.001], np.float32)
    cond = {"text": TEXT[[0, 0]], "text_mask": MASK[[0, 0]]}
    one, other = np.asarray(rough(params, X[[0, 0]], late, cond))
    assert np.abs(one - other).max() > 1e-3


def test_parameters_name_their_axes():
    axes = models.axes(functools.partial(small, scan=True))
    assert axes["blocks"]["qkv"]["q"]["kernel"] == ("layers", "embed", "heads")
    assert axes["text_blocks"]["mlp_gate"]["kernel"] == ("layers", "embed", "mlp")
    assert axes["embed_text"]["kernel"] == ("text", "embed")
    assert axes["image_pad"] == ("embed",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, r"heads=5 does not divide width=24"),
        ({"rope_dims": (4, 4)}, r"rope_dims=\(4, 4\) sum to 8, a head has 12 channels"),
        ({"rope_dims": (6, 6)}, "must be for frame, row and column"),
        ({"positions": (64, 64)}, r"positions=\(64, 64\) must be for frame, row and column"),
        ({"refiners": -1}, "refiners=-1 must not be negative"),
        ({"depth": 0}, "depth=0 must be positive"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X[:, :3]}, r"divisible by 2 \(patch=2\), not 3 x 6; the nearest is 4 x 6"),
        ({"cond": {}}, r"ZImage needs cond\['text'\] of shape \[2, L, 6\]; cond has \[\]"),
        ({"cond": COND | {"text_mask": MASK[:, 1:]}}, r"bool \[2, 33\].*not bool \[2, 32\]"),
        (
            {"cond": {"text": np.zeros((2, 1505, 6))}},
            "takes texts of up to 1504 tokens and images up to 1024 x 1024; given are 1536 tokens",
        ),
        ({"x": np.zeros((2, 4, 1026, 2))}, "given are 64 tokens and 4 x 1026"),
    ],
)
def test_wrong_inputs(inputs, message):
    apply, shapes = models.abstract(small)
    given = {"x": X, "t": T, "cond": COND} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, given["x"], given["t"], given["cond"])
