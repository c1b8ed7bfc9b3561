"""FLUX: published counts, rotary positions, scanned against unrolled, and conditions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models.flux import Flux, SingleBlock, flux_dev, flux_schnell

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 4, 8, 2)).astype(np.float32)
T = np.asarray([0.2, 0.9], np.float32)
COND = {
    "text": RANDOM.standard_normal((2, 3, 6)).astype(np.float32),
    "pooled": RANDOM.standard_normal((2, 5)).astype(np.float32),
    "guidance": np.asarray([3.5, 1.0], np.float32),
}
FIELDS = {"in_channels": 2, "width": 24, "depth": 2, "single_depth": 2, "heads": 2}
FIELDS |= {"text_width": 6, "pooled_width": 5, "rope_dims": (2, 4, 6), "scalars": ("guidance",)}
STACKS = ("blocks", "singles")


def small(rngs, **changes):
    return Flux(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.init(functools.partial(small, **changes), KEY)
    _, params = models.init(functools.partial(small, **(changes | {"scan": False})), KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.1 * random.standard_normal(w.shape, np.float32), params)
    return jax.jit(apply), models.stack_blocks(params, STACKS) if changes.get("scan") else params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("fields", "expected"), [(flux_dev, 11_901_408_320), (flux_schnell, 11_891_178_560)]
)
def test_published_parameter_counts(fields, expected, scan):
    _, shapes = models.abstract(lambda rngs: Flux(**fields(scan=scan), rngs=rngs))
    assert models.count(shapes) == expected


def test_starts_at_zero():
    apply, _ = network(scan=True)
    _, params = models.init(functools.partial(small, scan=True), KEY)
    np.testing.assert_array_equal(apply(params, X, T, COND), np.zeros_like(X))


def test_single_block_is_attention_beside_an_mlp_and_starts_as_the_identity():
    """h + gate out([attention(y), gelu(mlp(y))]), y = (1 + scale) norm(h) + shift, in numpy."""
    build = functools.partial(SingleBlock, 8, 1, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    random = np.random.default_rng(2)
    h, c = (random.standard_normal(s).astype(np.float32) for s in ((2, 5, 8), (2, 8)))
    call = jax.jit(lambda p, h, turn: apply.merge(p)(h, c, None, turn))
    still = np.zeros((5, 4), np.float32)
    np.testing.assert_array_equal(call(params, h, still), h)
    p = jax.tree.map(lambda w: w + 0.5 * random.standard_normal(w.shape, np.float32), params)

    def linear(name, v, of=p):
        kernel, bias = of[name]["kernel"], of[name]["bias"].ravel()
        return v @ kernel.reshape(v.shape[-1], -1) + bias

    shift, scale, gate = np.split(linear("modulation", c)[:, None], 3, -1)
    centred = h - h.mean(-1, keepdims=True)
    y = centred / np.sqrt(h.var(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    q, k, v = (linear(name, y, p["qkv"]) for name in "qkv")
    q, k = (
        a / np.sqrt(np.square(a).mean(-1, keepdims=True) + 1e-6) * p["qkv"][name]["scale"]
        for name, a in (("norm_q", q), ("norm_k", k))
    )
    weights = np.exp(np.einsum("bqd,bkd->bqk", q, k) / np.sqrt(8))
    attended = weights / weights.sum(-1, keepdims=True) @ v
    m = linear("mlp", y)
    m = 0.5 * m * (1 + np.tanh(np.sqrt(2 / np.pi) * (m + 0.044715 * m**3)))
    expected = h + gate * linear("out", np.concatenate([attended, m], -1))
    np.testing.assert_allclose(call(p, h, still), expected, rtol=1e-3, atol=1e-3)


@functools.cache
def gradient(**changes):
    """`(output, gradient of a squared error)`, with the blocks unstacked."""
    apply, params = network(**changes)

    def loss(p):
        y = apply(p, X, T, COND)
        return jnp.square(y - X).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, models.unstack_blocks(grads, STACKS) if changes.get("scan") else grads


def test_every_weight_gets_a_gradient(all_gradients_live):
    y, grads = gradient()
    assert y.shape == X.shape
    assert y.dtype == jnp.float32
    all_gradients_live(grads)


def test_scan_and_remat_change_no_number():
    (y, grads), (z, others) = gradient(), gradient(scan=True, remat="full")
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(one).max())


def test_scanned_program_does_not_grow_with_depth():
    def size(depth):
        build = functools.partial(small, depth=depth, single_depth=2 * depth, scan=True)
        apply, shapes = models.abstract(build)
        return str(jax.make_jaxpr(apply)(shapes, X, T, COND)).count("\n")

    assert size(2) == size(5)


def test_text_has_no_order_and_patches_have():
    """Text tokens sit at the origin together."""
    apply, params = network(scan=True)
    y = apply(params, X, T, COND)
    shuffled = apply(params, X, T, COND | {"text": COND["text"][:, ::-1]})
    np.testing.assert_allclose(shuffled, y, rtol=1e-4, atol=1e-4)
    for axis in (1, 2):  # patches reversed, their pixels as they are
        patches = X.reshape(2, 2, 2, 4, 2, 2)
        flipped = np.flip(patches, 2 * axis - 1).reshape(X.shape)
        z = np.asarray(apply(params, flipped, T, COND)).reshape(patches.shape)
        assert np.abs(np.flip(z, 2 * axis - 1).reshape(X.shape) - y).max() > 1e-2


def test_masked_text_is_not_seen():
    apply, params = network(scan=True)
    mask = np.asarray([[True, True, False]] * 2)
    y = apply(params, X, T, COND | {"text_mask": mask})
    other = COND["text"].copy()
    other[:, 2] += 5.0
    np.testing.assert_array_equal(y, apply(params, X, T, COND | {"text_mask": mask, "text": other}))
    assert np.abs(y - apply(params, X, T, COND)).max() > 1e-3


def test_samples_see_their_own_conditions_alone():
    apply, params = network(scan=True)
    y = np.asarray(apply(params, X, T, COND))
    bump = np.asarray([0.0, 0.1], np.float32)
    others = [(X, T + bump, COND)] + [
        (X, T, COND | {name: value + bump.reshape(2, *(1,) * (value.ndim - 1))})
        for name, value in COND.items()
    ]
    for x, t, cond in others:
        moved = np.abs(np.asarray(apply(params, x, t, cond)) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-4
        assert moved[0] < 1e-5


def test_one_attention_sees_text_and_image():
    apply, shapes = models.abstract(small)
    seen = []

    def kernel(q, k, v):
        seen.append((q.shape[1], k.shape[1]))
        return v

    jax.eval_shape(apply.with_attention(kernel), shapes, X, T, COND)
    assert seen == 4 * [(3 + 8, 3 + 8)]


def test_bfloat16_is_close_and_keeps_time_exact():
    exact, params = network(scan=True)
    rough, _ = network(scan=True, dtype="bfloat16")
    y, z = exact(params, X, T, COND), rough(params, X, T, COND)
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    same = {name: np.stack([value[0]] * 2) for name, value in COND.items()}
    late = np.asarray([0.999, 1.0], np.float32)  # 1000 t is one number in bfloat16
    out = np.asarray(rough(params, np.stack([X[0]] * 2), late, same))
    assert np.abs(out[0] - out[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, r"heads=5 does not divide width=24"),
        ({"rope_dims": (4, 4, 6)}, r"rope_dims=\(4, 4, 6\) sum to 14, a head has 12 channels"),
        ({"rope_dims": (6, 6)}, r"rope_dims=\(6, 6\) must be for frame, row and column"),
        ({"depth": 0, "single_depth": 0}, "leave no block"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


def test_guidance_is_asked_for():
    apply, shapes = models.abstract(small)
    cond = {name: value for name, value in COND.items() if name != "guidance"}
    with pytest.raises(
        ValueError, match=r"needs cond\['guidance'\].*cond has \['pooled', 'text'\]"
    ):
        jax.eval_shape(apply, shapes, X, T, cond)
