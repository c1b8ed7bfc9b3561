"""PixArt: published start, text and its mask, micro-conditions, scan, refusals.

That it computes what the published networks do is in tests/parity/models/test_pixart.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 8, 4, 2)).astype(np.float32)
T = np.asarray([3.0, 0.2, 900.0], np.float32)
COND = {
    "text": RANDOM.standard_normal((3, 5, 6)).astype(np.float32),
    "text_mask": np.arange(5) < np.asarray([[5], [2], [3]]),
    "resolution": np.asarray([[512, 768], [1024, 1024], [640, 320]], np.float32),
    "aspect_ratio": np.asarray([0.6667, 1.0, 2.0], np.float32),
}
FIELDS = {"in_channels": 2, "width": 24, "depth": 2, "heads": 2, "text_width": 6, "image_size": 8}
FIELDS |= {"micro_conditions": True}


def small(rngs, **changes):
    return models.PixArt(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(apply, params)` with every weight random; the same weights scanned or not."""
    apply, _ = models.init(functools.partial(small, **changes), KEY)
    _, params = models.init(small, KEY)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w + 0.2 * random.standard_normal(w.shape, np.float32), params)
    return apply, models.stack_blocks(params) if changes.get("scan") else params


CALL = jax.jit(lambda apply, params, t, cond: apply(params, X, t, cond), static_argnums=0)


def test_published_start():
    """Output and attention to the text start at zero, the tables with variance 1 / width."""
    _, params = models.init(lambda r: small(r, width=192), KEY)
    block = params["blocks"]["0"]
    assert not np.any(params["out"]["kernel"])
    assert not np.any(block["cross_project"]["kernel"])
    assert np.std(block["table"]) == pytest.approx(192**-0.5, rel=0.05)
    assert np.std(block["q"]["kernel"]) == pytest.approx(192**-0.5, rel=0.02)
    assert np.std(params["modulation"]["kernel"]) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("scan", [False, True])
def test_count_does_not_depend_on_scan(scan):
    """Published as 0.6 billion; diffusers' exact number is in the parity tests."""
    fields = models.pixart_alpha(256, scan=scan)
    _, shapes = models.abstract(lambda rngs: models.PixArt(**fields, rngs=rngs))
    assert round(models.count(shapes) / 1e8) == 6


def test_scan_changes_no_number_and_every_weight_gets_a_gradient(all_gradients_live):
    apply, params = network()
    scanned, stacked = network(scan=True, remat=True)

    def loss(params):
        y = scanned(params, X, T, COND)
        return jnp.square(y).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
    np.testing.assert_allclose(y, CALL(apply, params, T, COND), rtol=1e-4, atol=1e-4)
    # A key's bias adds the same to all scores of a query: its gradient is zero.
    for name in ("k", "cross_k"):
        del grads["blocks"][name]["bias"]
    all_gradients_live(grads)


@pytest.mark.parametrize("told", ["t", "text", "resolution", "aspect_ratio"])
def test_each_condition_is_seen_by_its_own_sample(told):
    apply, params = network()
    y = np.asarray(CALL(apply, params, T, COND))
    t, cond = T.copy(), {name: value.copy() for name, value in COND.items()}
    changed = t if told == "t" else cond[told]
    changed[1] = changed[1] + 1.5
    moved = np.abs(np.asarray(CALL(apply, params, t, cond)) - y).max(axis=(1, 2, 3))
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() < 1e-5


def test_masked_text_is_text_that_is_not_there():
    apply, params = network()
    y = CALL(apply, params, T, COND)
    noisy = COND["text"] + 9.0 * ~COND["text_mask"][..., None]
    np.testing.assert_allclose(CALL(apply, params, T, COND | {"text": noisy}), y, atol=1e-5)
    short = {"text": COND["text"][:, :2], "text_mask": COND["text_mask"][:, :2]}
    np.testing.assert_allclose(CALL(apply, params, T, COND | short)[1], y[1], rtol=1e-4, atol=1e-5)
    whole = {name: value for name, value in COND.items() if name != "text_mask"}
    seen = np.abs(CALL(apply, params, T, whole) - y).max(axis=(1, 2, 3))
    assert seen[0] < 1e-5
    assert seen[1:].min() > 1e-3


def test_bfloat16_is_close_and_keeps_time_exact():
    exact, params = network()
    rough, _ = network(dtype="bfloat16")
    y, z = CALL(exact, params, T, COND), CALL(rough, params, T, COND)
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    later = T + np.asarray([0, 0, 1], np.float32)  # 900 and 901 are one number in bfloat16
    assert np.abs(CALL(rough, params, later, COND) - z)[2].max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 20}, "width=20 must be a multiple of 3 for micro_conditions"),
        ({"image_size": 7}, "image_size=7 must be a multiple of patch=2"),
        ({"interpolation": 0.0}, "interpolation=0.0 must be positive"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))
    with pytest.raises(ValueError, match="image_size=300 is none of 256, 512, 1024"):
        models.pixart_alpha(300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": COND["text"][..., :4]}, r"\[3, L, 6\]; not \[3, 5, 4\]"),
        ({"text": None}, r"needs cond\['text'\]"),
        ({"text_mask": COND["text_mask"][:, :4]}, r"bool \[B, L\] = \[3, 5\], not bool \[3, 4\]"),
        ({"aspect_ratio": T[:2]}, r"cond\['aspect_ratio'\], numbers of shape \[3\]; not \[2\]"),
    ],
)
def test_wrong_conditions(changes, message):
    apply, shapes = models.abstract(small)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, X, T, COND | changes)
