"""DiT: published counts, adaLN-Zero, scanned against unrolled, and conditions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models import dit, dit_blocks

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 8, 4, 2)).astype(np.float32)
T = np.asarray([3.0, 0.2, 900.0], np.float32)
LABEL = np.asarray([1, 4, 0], np.int32)
FIELDS = {"in_channels": 2, "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 4}


def small(rngs, **changes):
    return models.DiT(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.init(functools.partial(small, **changes), KEY)
    _, params = models.init(small, KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.2 * random.standard_normal(w.shape, np.float32), params)
    return jax.jit(apply), models.stack_blocks(params) if changes.get("scan") else params


COUNTS = {
    "S/2": 32_865_056,
    "S/4": 32_920_448,
    "S/8": 33_142_016,
    "B/2": 130_315_808,
    "B/4": 130_426_496,
    "B/8": 130_869_248,
    "L/2": 457_840_672,
    "L/4": 457_988_224,
    "L/8": 458_578_432,
    "XL/2": 674_834_720,
    "XL/4": 675_000_704,
    "XL/8": 675_664_640,
}
SIT_COUNTS = {"S/2": 32_858_896, "B/2": 130_303_504, "L/2": 457_824_272, "XL/2": 674_816_272}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [(n, models.dit_imagenet, c) for n, c in COUNTS.items()]
    + [(n, models.sit_imagenet, c) for n, c in SIT_COUNTS.items()],
)
def test_published_parameter_counts(name, preset, expected, scan):
    fields = preset(name, scan=scan)
    _, shapes = models.abstract(lambda rngs: models.DiT(**fields, rngs=rngs))
    assert models.count(shapes) == expected


def test_starts_at_zero_with_identity_blocks():
    apply, params = models.init(small, KEY)
    y = jax.jit(apply)(params, X, T, {"label": LABEL})
    np.testing.assert_array_equal(y, np.zeros_like(X))
    build = functools.partial(dit_blocks.AdaLNZero, 16, 2, 64, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    h, c = jnp.asarray(X.reshape(3, 4, 16)), jnp.ones((3, 16))
    np.testing.assert_array_equal(jax.jit(apply.merge(params).__call__)(h, c), h)


def test_block_modulates_shift_scale_gate():
    """adaLN's six vectors, in DiT's order, against the formula written out in numpy."""
    random = np.random.default_rng(2)
    build = functools.partial(dit_blocks.AdaLNZero, 8, 2, 16, dtype=jnp.float32)
    apply, params = models.init(lambda rngs: build(rngs=rngs), KEY)
    params = jax.tree.map(
        lambda w: 0.5 * random.standard_normal(w.shape).astype(np.float32), params
    )
    h, c = random.standard_normal((2, 5, 8)), random.standard_normal((2, 8))
    y = jax.jit(apply.merge(params).__call__)(jnp.float32(h), jnp.float32(c))

    def linear(name, v):
        kernel = params[name]["kernel"]
        return v @ kernel.reshape(len(kernel), -1) + params[name]["bias"].ravel()

    def norm(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def attend(v):
        out = []
        query, key, value = np.split(v, 3, axis=-1)
        for q, k, u in zip(*(np.split(part, 2, axis=-1) for part in (query, key, value))):
            logits = np.exp(np.einsum("bqc,bkc->bqk", q, k) / 2.0)
            out.append(logits / logits.sum(-1, keepdims=True) @ u)
        return np.concatenate(out, axis=-1)

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear("modulation", c)[:, None], 6, -1)
    h = h + gate1 * linear("project", attend(linear("qkv", norm(h) * (1 + scale1) + shift1)))
    h = h + gate2 * linear("mlp2", gelu(linear("mlp1", norm(h) * (1 + scale2) + shift2)))
    np.testing.assert_allclose(y, h, rtol=1e-4, atol=1e-4)


def test_published_initial_spread():
    _, params = models.init(lambda r: small(r, width=128, num_classes=200), KEY)
    block = params["blocks"]["0"]
    assert np.std(block["qkv"]["kernel"]) == pytest.approx((2 / (4 * 128)) ** 0.5, rel=0.02)
    assert np.std(params["time1"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(params["label"]) == pytest.approx(0.02, rel=0.02)
    assert not np.any(block["modulation"]["kernel"])
    assert not np.any(params["out"]["kernel"])
    _, stacked = models.init(lambda r: small(r, width=128, scan=True), KEY)
    kernels = stacked["blocks"]["qkv"]["kernel"]
    assert kernels.shape == (2, 128, 3, 128)
    assert np.std(kernels) == pytest.approx((2 / (4 * 128)) ** 0.5, rel=0.02)
    assert abs(np.corrcoef(kernels[0].ravel(), kernels[1].ravel())[0, 1]) < 0.03


def test_patches_run_row_by_row():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = dit.patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(dit.unpatchify(tokens, 2, 2, 3), x)


@functools.cache
def gradient(**changes):
    """`(output, gradient of a squared error)`, with the blocks unstacked."""
    apply, params = network(**changes)

    def loss(p):
        y = apply(p, X, T, {"label": LABEL})
        return jnp.square(y - X).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, models.unstack_blocks(grads) if changes.get("scan") else grads


def test_every_weight_gets_a_gradient(all_gradients_live):
    y, grads = gradient()
    assert y.shape == X.shape
    assert y.dtype == jnp.float32
    all_gradients_live(grads)


@pytest.mark.parametrize(
    "changes", [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}], ids=str
)
def test_scan_and_remat_change_no_number(changes):
    (y, grads), (z, others) = gradient(), gradient(**changes)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(one).max())
    apply, params = network(**changes)
    program = jax.make_jaxpr(jax.grad(lambda p: apply(p, X, T, {"label": LABEL}).sum()))(params)
    assert ("remat" in str(program)) == changes.get("remat", False)
    assert (" scan[" in str(program)) == changes.get("scan", False)


def test_stacking_round_trip():
    _, params = models.init(small, KEY)
    again = models.unstack_blocks(models.stack_blocks(params))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    stacked = models.abstract(functools.partial(small, scan=True))[1]
    assert jax.tree.structure(stacked) == jax.tree.structure(models.stack_blocks(params))


def test_scanned_program_does_not_grow_with_depth():
    def size(depth, scan):
        apply, shapes = models.abstract(functools.partial(small, depth=depth, scan=scan))
        jaxpr = jax.make_jaxpr(apply)(shapes, X, T, {"label": LABEL})
        return str(jaxpr).count("\n")

    assert size(3, True) == size(12, True)
    assert size(12, False) > 2 * size(3, False)


def test_samples_do_not_see_each_other():
    apply, params = network()
    y = np.asarray(apply(params, X, T, {"label": LABEL}))
    others = X.copy()
    others[1:] += 1.0
    z = np.asarray(apply(params, others, T, {"label": LABEL}))
    np.testing.assert_allclose(z[0], y[0], rtol=1e-5, atol=1e-5)
    for changed in (
        apply(params, X, T + np.asarray([0, 0.5, 0], np.float32), {"label": LABEL}),
        apply(params, X, T, {"label": np.asarray([1, 2, 0], np.int32)}),
    ):
        moved = np.abs(np.asarray(changed) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-3
        assert moved[[0, 2]].max() < 1e-5


def test_a_label_out_of_range_is_not_silently_another():
    apply, params = network()
    y = apply(params, X, T, {"label": np.asarray([1, 5, 0], np.int32)})
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[::2]).all()


def test_key_has_no_effect():
    apply, params = network()
    plain = apply(params, X, T, {"label": LABEL})
    np.testing.assert_array_equal(plain, apply(params, X, T, {"label": LABEL}, key=KEY))


def test_bfloat16_is_close_and_keeps_time_exact():
    exact, params = network()
    rough, _ = network(dtype=jnp.bfloat16)
    y = exact(params, X, T, {"label": LABEL})
    z = rough(params, X, T, {"label": LABEL})
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    # 999 and 1000 are one number in bfloat16.
    late = np.asarray([999.0, 1000.0, 999.0], np.float32)
    same = np.stack([X[0]] * 3)
    out = np.asarray(rough(params, same, late, {"label": LABEL * 0}))
    np.testing.assert_array_equal(out[0], out[2])
    assert np.abs(out[0] - out[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, r"heads=3 does not divide width=16; these do: \[1, 2, 4, 8\]"),
        ({"width": 18, "heads": 2}, "width=18 must be a multiple of 4"),
        ({"patch": 0}, "patch=0 must be positive"),
        ({"depth": 0}, "depth=0 must be positive"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


def test_unknown_size_offers_the_nearest():
    with pytest.raises(ValueError, match=r"name='DiT-XL/3' is none of .*nearest is 'XL/"):
        models.dit_imagenet("DiT-XL/3")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X[:, :7]}, r"divisible by 2 \(patch=2\), not 7 x 4; the nearest is 8 x 4"),
        ({"x": X[..., :1]}, r"in_channels=2 takes x of shape \[B, H, W, 2\], not \[3, 8, 4, 1\]"),
        ({"t": T[:1]}, r"t of shape \[B\] = \[3\], not \[1\]"),
        (
            {"cond": {"text": T}},
            r"needs cond\['label'\].*where 4 stands for no label; cond has \['text'\]",
        ),
    ],
)
def test_wrong_inputs(inputs, message):
    apply, shapes = models.abstract(small)
    given = {"x": X, "t": T, "cond": {"label": LABEL}} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, given["x"], given["t"], given["cond"])
