"""MM-DiT: published counts, the table of positions, scanned against unrolled, and conditions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.models.initializers import Unseeded
from jdiff.models.mmdit import MMDiT, mmdit, sd3_medium, sd35_large, sd35_medium

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 8, 4, 2)).astype(np.float32)
T = np.asarray([3.0, 700.0], np.float32)
COND = {
    "text": RANDOM.standard_normal((2, 3, 6)).astype(np.float32),
    "pooled": RANDOM.standard_normal((2, 5)).astype(np.float32),
}
FIELDS = {"in_channels": 2, "width": 16, "depth": 4, "heads": 2, "dual_depth": 1, "qk_norm": True}
FIELDS |= {"text_width": 6, "pooled_width": 5, "image_size": 12, "positions": 9}
STACKS = ("dual_blocks", "blocks")


def small(rngs, **changes):
    return MMDiT(**(FIELDS | changes), rngs=rngs)


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
    ("fields", "expected"),
    [(sd3_medium, 2_028_328_000), (sd35_medium, 2_243_171_520), (sd35_large, 8_056_627_520)],
)
def test_published_parameter_counts(fields, expected, scan):
    _, shapes = models.abstract(lambda rngs: MMDiT(**fields(scan=scan), rngs=rngs))
    assert models.count(shapes) == expected


def test_the_papers_family():
    assert mmdit(38, qk_norm=True) == sd35_large()
    assert mmdit(15)["width"] == 960


def test_starts_at_zero():
    apply, _ = network(scan=True)
    _, params = models.init(functools.partial(small, scan=True), KEY)
    np.testing.assert_array_equal(apply(params, X, T, COND), np.zeros_like(X))


@functools.cache
def gradient():
    """`(output, gradient of a squared error)` of the scanned, recomputed network."""
    apply, params = network(scan=True, remat="full")

    def loss(p):
        y = apply(p, X, T, COND)
        return jnp.square(y - X).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, grads


def test_every_weight_gets_a_gradient_but_the_last_texts_queries(all_gradients_live):
    y, grads = gradient()
    assert y.shape == X.shape
    assert y.dtype == jnp.float32
    unread = grads["last"]["text"]["qkv"]
    for name in ("q", "norm_q"):
        for leaf in jax.tree.leaves(unread[name]):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    live = {name: leaf for name, leaf in unread.items() if name not in ("q", "norm_q")}
    last = grads["last"] | {"text": grads["last"]["text"] | {"qkv": live}}
    all_gradients_live(grads | {"last": last})


def test_scan_and_remat_change_no_number():
    """Of the output; test_flux.py looks at gradients too."""
    apply, params = network()
    y = apply(params, X, T, COND)
    scanned, stacked = network(scan=True)
    np.testing.assert_allclose(scanned(stacked, X, T, COND), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient()[0], y, rtol=1e-4, atol=1e-5)


def test_scanned_program_does_not_grow_with_depth():
    def size(depth, scan):
        build = functools.partial(small, depth=depth, dual_depth=depth // 2, scan=scan)
        apply, shapes = models.abstract(build)
        return str(jax.make_jaxpr(apply)(shapes, X, T, COND)).count("\n")

    assert size(8, True) == size(12, True)
    assert size(12, False) > 1.4 * size(8, False)


def test_positions_are_the_middle_of_the_table():
    """Token (row, column) of the middle, columns first, the unit being image_size / positions."""
    model = small(Unseeded())
    table = np.asarray(model._positions(4, 3))
    step, width = (12 // 2) / 9, 16
    for row in range(4):
        for column in range(3):
            expected = []
            for index in (column + (9 - 3) // 2, row + (9 - 4) // 2):
                angles = index * step * 10_000.0 ** -(np.arange(width // 4) / (width // 4))
                expected += [*np.sin(angles), *np.cos(angles)]
            np.testing.assert_allclose(table[3 * row + column], expected, atol=1e-6)


def test_a_stored_table_is_read_and_gets_no_gradient():
    exact, params = network(scan=True)
    table = jnp.reshape(small(Unseeded())._positions(9, 9), (9, 9, 16))
    stored, shapes = models.abstract(functools.partial(small, stored_positions=True, scan=True))
    assert shapes["table"].shape == table.shape
    apply = jax.jit(stored)
    y = apply(params | {"table": table}, X, T, COND)
    np.testing.assert_allclose(y, exact(params, X, T, COND), rtol=1e-4, atol=1e-5)
    assert np.abs(apply(params | {"table": table[::-1]}, X, T, COND) - y).max() > 1e-3

    def added(table):
        return stored.merge(params | {"table": table})._positions(4, 2).sum()

    assert added(table) != 0
    np.testing.assert_array_equal(jax.grad(added)(table), np.zeros_like(table))


def test_one_attention_sees_text_and_image_and_the_dual_blocks_have_one_more():
    apply, shapes = models.abstract(small)
    seen = []

    def kernel(q, k, v):
        seen.append((q.shape[1], k.shape[1]))
        return v

    jax.eval_shape(apply.with_attention(kernel), shapes, X, T, COND)
    assert seen == [(11, 11), (8, 8)] + 3 * [(11, 11)]
    seen.clear()
    jax.eval_shape(apply.with_attention(kernel, "last|dual_blocks/0"), shapes, X, T, COND)
    assert seen == [(11, 11), (8, 8), (11, 11)]


def test_blocks_can_be_skipped():
    apply, params = network(scan=True)
    skipped = models.abstract(functools.partial(small, scan=True))[0].without_blocks("blocks/1")
    y = jax.jit(skipped)(params, X, T, COND)
    stack = params["blocks"]
    gates = jax.tree.map(lambda w: w.at[1].set(0.0), {n: stack[n]["modulation"] for n in stack})
    idle = params | {"blocks": {n: stack[n] | {"modulation": gates[n]} for n in stack}}
    np.testing.assert_allclose(y, apply(idle, X, T, COND), rtol=1e-4, atol=1e-5)
    assert np.abs(y - apply(params, X, T, COND)).max() > 1e-3


def test_samples_see_their_own_conditions_alone():
    apply, params = network(scan=True)
    y = np.asarray(apply(params, X, T, COND))
    bump = np.asarray([0.0, 1.0], np.float32)
    others = [
        (X + bump[:, None, None, None], T, COND),
        (X, T + bump, COND),
        (X, T, COND | {"text": COND["text"] + bump[:, None, None]}),
        (X, T, COND | {"pooled": COND["pooled"] + bump[:, None]}),
    ]
    for x, t, cond in others:
        moved = np.abs(np.asarray(apply(params, x, t, cond)) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-3
        assert moved[0] < 1e-5


def test_bfloat16_is_close_and_keeps_time_exact():
    exact, params = network(scan=True)
    rough, _ = network(scan=True, dtype="bfloat16")
    y, z = exact(params, X, T, COND), rough(params, X, T, COND)
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    same = {name: np.stack([value[0]] * 2) for name, value in COND.items()}
    late = np.asarray([999.0, 1000.0], np.float32)  # one number in bfloat16
    out = np.asarray(rough(params, np.stack([X[0]] * 2), late, same))
    assert np.abs(out[0] - out[1]).max() > 1e-3


def test_logical_axes():
    axes = models.axes(functools.partial(small, scan=True))
    block = axes["blocks"]["image"]
    assert block["qkv"]["q"]["kernel"] == ("layers", "embed", "heads")
    assert block["project"]["kernel"] == ("layers", "heads", "embed")
    assert block["mlp1"]["kernel"] == ("layers", "embed", "mlp")
    assert axes["embed_text"]["kernel"] == ("text", "embed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, r"heads=3 does not divide width=16"),
        ({"width": 18}, "width=18 must be a multiple of 4"),
        ({"dual_depth": 4}, r"dual_depth=4 must be from 0 to depth - 1 = 3"),
        ({"pooled_width": 0}, "pooled_width=0 must be positive"),
        ({"remat": "ful"}, "remat.*full"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:, :7], r"divisible by 2 \(patch=2\), not 7 x 4"),
        (X[..., :1], r"in_channels=2 takes x of shape \[B, H, W, 2\]"),
        (np.zeros((2, 20, 4, 2)), r"positions=9 takes images up to 18 x 18, not 20 x 4"),
    ],
)
def test_wrong_inputs(x, message):
    apply, shapes = models.abstract(small)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, x, T, COND)
