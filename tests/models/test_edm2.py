"""EDM2: published counts, magnitudes kept by each layer, weights whose directions alone count."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import models
from jdiff.models import edm2, magnitude
from jdiff.models.edm2 import EDM2

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 8, 8, 2)).astype(np.float32)
T = np.asarray([-0.5, 0.1, 0.6], np.float32)
LABEL = np.asarray([1, 4, 0], np.int32)
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
FIELDS = {
    "image_size": 8,
    "in_channels": 2,
    "channels": 16,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_sizes": (4,),
    "head_channels": 8,
    "num_classes": 4,
}


def small(rngs, **changes):
    return EDM2(**(FIELDS | changes), rngs=rngs)


@functools.cache
def network(**changes):
    """`(jitted apply, params)` with the gains, which start at zero, at about a half."""
    apply, params = models.init(functools.partial(small, **changes), KEY)
    gains = np.random.default_rng(1)
    opened = lambda w: jnp.asarray(0.5 + 0.1 * gains.standard_normal(), w.dtype)
    params = jax.tree.map(lambda w: w if w.ndim else opened(w), params)
    return jax.jit(apply, compiler_options=QUICK), params


@functools.cache
def gradient():
    params, (apply, _) = network()[1], models.abstract(small)
    loss = lambda p: jnp.square(apply(p, X, T, {"label": LABEL}) - X).sum()
    return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)


def rms(x, axis=None):
    return np.sqrt(np.square(np.asarray(x, np.float64)).mean(axis=axis))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("img512-XXS", 31_309_029),
        ("img512-XS", 124_713_253),
        ("img512-S", 280_212_837),
        ("img512-M", 497_807_781),
        ("img512-L", 777_498_085),
        ("img512-XL", 1_119_283_749),
        ("img512-XXL", 1_523_164_773),
        ("img64-S", 280_209_381),
        ("img64-M", 497_803_173),
        ("img64-L", 777_492_325),
        ("img64-XL", 1_119_276_837),
    ],
)
def test_published_parameter_counts(name, published):
    """Weights and gains, no buffers. 128 of the weights predict the loss's variance."""
    _, shapes = models.abstract(lambda rngs: EDM2(**models.edm2_imagenet(name), rngs=rngs))
    assert models.count(shapes) + 128 == published


def test_each_operation_keeps_unit_magnitude():
    a, b = RANDOM.standard_normal((2, 4096, 64)).astype(np.float32)
    assert rms(magnitude.mp_silu(a)) == pytest.approx(1, abs=0.01)
    for t in (0.0, 0.3, 0.5, 1.0):
        assert rms(magnitude.mp_sum(a, b, t)) == pytest.approx(1, abs=0.01)
        joined = magnitude.mp_cat(a, b[:, :16], t)
        assert rms(joined) == pytest.approx(1, abs=0.01)
        # The parts contribute by their shares, however many channels each has.
        parts = [np.square(part).sum() for part in np.split(np.asarray(joined), [64], axis=-1)]
        assert parts[1] * (1 - t) ** 2 == pytest.approx(parts[0] * t**2, rel=0.03)
    np.testing.assert_allclose(magnitude.mp_sum(a, b, 0.0), a, rtol=1e-6)
    np.testing.assert_allclose(rms(magnitude.unit(7 * a), axis=-1), 1, rtol=1e-4)
    _, params = models.init(lambda r: magnitude.MPLinear(64, 96, rngs=r), KEY)
    apply = magnitude.MPLinear(64, 96, rngs=models.initializers.Unseeded())
    apply.kernel.set_value(5 * params["kernel"])
    assert rms(apply(a)) == pytest.approx(1, abs=0.02)
    assert rms(apply(a, 0.25)) == pytest.approx(0.25, abs=0.005)


@functools.cache
def magnitudes():
    """Of a wide network's embedding, of what enters each of its blocks and of what leaves it."""
    wide = {"channels": 64, "head_channels": 32, "num_classes": 64}
    apply, params = models.init(functools.partial(small, **wide), KEY)
    seen, run = [], edm2.run

    def spy(block, h, embedding, *rest, **kwargs):
        out = run(block, h, embedding, *rest, **kwargs)
        seen.append((h, out, embedding))
        return out

    def traced(params):
        seen.clear()
        apply(params, X, T, {"label": LABEL})
        return [[jnp.sqrt(jnp.square(a).mean()) for a in triple] for triple in seen]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edm2, "run", spy)
        return np.asarray(jax.jit(traced, compiler_options=QUICK)(params))


def test_unit_magnitude_through_every_block_at_the_start():
    """Figure 21 with fresh weights. Attention averages values, which takes a few percent away."""
    table = magnitudes()
    assert len(table) == 2 * 1 + 1 + 2 + 2 * 2 + 1
    assert np.abs(table - 1).max() < 0.2
    assert np.abs(table[:, 2] - 1).max() < 0.1


def test_fourier_features_have_unit_magnitude_at_any_time():
    """Equation 75: sqrt(2) cos, with phases that leave no time at which all are small."""
    t = np.linspace(-1.6, 1.1, 50)[:, None]  # log(sigma) / 4 for sigma 0.002 to 80
    net = small(models.initializers.Unseeded(), channels=64)
    waves = math.sqrt(2) * np.cos(np.asarray(net.frequencies) * t + np.asarray(net.phases))
    assert np.abs(rms(waves, axis=1) - 1).max() < 0.1
    assert rms(net.frequencies) == pytest.approx(2 * math.pi, rel=0.03)


def test_only_the_direction_of_a_weight_counts():
    apply, params = network()
    lengths = lambda w: np.exp(RANDOM.uniform(-1, 1, w.shape[-1:])).astype(np.float32)
    scaled = lambda w: np.asarray(w) * lengths(w)  # on the host: nothing to compile
    longer = jax.tree.map(lambda w: scaled(w) if w.ndim else w, params)
    y = np.asarray(apply(params, X, T, {"label": LABEL}))
    assert rms(y) > 0.1
    z = apply(longer, X, T, {"label": LABEL})
    np.testing.assert_allclose(z, y, atol=2e-3 * np.abs(y).max())


def test_gradients_are_orthogonal_to_the_weights(all_gradients_live):
    """So that plain descent lengthens a weight at every step (section 2.3)."""
    _, params = network()
    all_gradients_live(gradient())
    for (path, w), g in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(gradient())
    ):
        if w.ndim:
            w, g = np.asarray(w), np.asarray(g)
            along = np.abs((w * g).sum(axis=tuple(range(w.ndim - 1))))
            length = np.linalg.norm(w.ravel()) * np.linalg.norm(g.ravel())
            assert along.max() < 1e-3 * length, jax.tree_util.keystr(path)


def test_normalize_fixes_the_lengths_and_changes_no_output():
    apply, params = network()
    longer = jax.tree.map(lambda w: 3 * np.asarray(w) if w.ndim else w, params)
    fixed = jax.jit(magnitude.normalize, compiler_options=QUICK)(longer)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(fixed), strict=True):
        if new.ndim:
            np.testing.assert_allclose(rms(new, axis=tuple(range(new.ndim - 1))), 1, rtol=2e-4)
        else:
            assert new == old
    y = np.asarray(apply(params, X, T, {"label": LABEL}))
    z = apply(fixed, X, T, {"label": LABEL})
    np.testing.assert_allclose(z, y, atol=2e-3 * np.abs(y).max())


def test_normalized_optimizer_is_a_step_then_normalize():
    params = {"a": {"kernel": jnp.asarray(RANDOM.standard_normal((5, 3)), jnp.float32)}}
    params |= {"gain": jnp.asarray(0.3)}
    grads = jax.tree.map(lambda w: jnp.full_like(w, 0.7), params)
    plain = optax.sgd(0.1)
    forced = magnitude.normalized(plain)
    updates, _ = forced.update(grads, forced.init(params), params)
    stepped = optax.apply_updates(params, plain.update(grads, plain.init(params), params)[0])
    got = optax.apply_updates(params, updates)
    assert jnp.abs(stepped["a"]["kernel"] - got["a"]["kernel"]).max() > 0.01
    for a, b in zip(jax.tree.leaves(magnitude.normalize(stepped)), jax.tree.leaves(got)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_attention_sees_unit_queries_keys_and_values():
    apply, shapes = models.abstract(small)
    seen = []

    def kernel(q, k, v):
        seen.extend([q, k, v])
        return v

    def traced(params):
        apply.with_attention(kernel)(params, X, T, {"label": LABEL})
        return [jnp.sqrt(jnp.square(a).mean(axis=-1)) for a in seen]

    for lengths in jax.jit(traced, compiler_options=QUICK)(network()[1]):
        assert lengths.shape == (3, 4, 4, 4)  # 32 channels in heads of 8
        np.testing.assert_allclose(lengths, 1, rtol=1e-3)


def test_output_starts_at_zero_and_blocks_without_the_embedding():
    _, params = models.init(small, KEY)
    gains = [w for w in jax.tree.leaves(params) if not w.ndim]
    assert len(gains) == 11
    assert not np.any(gains)


def test_samples_do_not_see_each_other():
    apply, params = network()
    y = np.asarray(apply(params, X, T, {"label": LABEL}))
    assert y.dtype == np.float32
    others = X.copy()
    others[1:] += 1.0
    z = np.asarray(apply(params, others, T, {"label": LABEL}))
    np.testing.assert_allclose(z[0], y[0], rtol=1e-4, atol=1e-5)
    for changed in (
        apply(params, X, T + np.asarray([0, 0.3, 0], np.float32), {"label": LABEL}),
        apply(params, X, T, {"label": np.asarray([1, 2, 0], np.int32)}),
    ):
        moved = np.abs(np.asarray(changed) - y).max(axis=(1, 2, 3))
        assert moved[1] > 1e-3
        assert moved[[0, 2]].max() < 1e-4


def test_null_label_adds_nothing():
    apply, params = network()
    null = np.full(3, 4, np.int32)
    silent = params | {"label": {"kernel": jnp.zeros_like(params["label"]["kernel"])}}
    y = apply(params, X, T, {"label": null})
    np.testing.assert_allclose(y, apply(silent, X, T, {"label": LABEL}), rtol=1e-4, atol=1e-5)


def test_clip_bounds_the_blocks():
    fields = {"side": "decoder", "width": 4, "head_channels": 8, "dropout": 0.0}
    fields |= {"balance": (0.3, 0.3), "clip": 0.1, "dtype": jnp.float32}
    apply, params = models.init(lambda rngs: edm2.Block(2, 8, **fields, rngs=rngs), KEY)
    block = jax.jit(lambda h: apply.merge(params)(h, jnp.zeros((3, 4)), None))
    y = np.asarray(block(X))
    assert np.abs(y).max() == np.float32(0.1)
    assert (y == -np.float32(0.1)).any()
    assert (np.abs(y) < 0.1).any()


def test_bfloat16_is_close_and_keeps_the_embedding_exact():
    exact, params = network()
    rough, _ = network(dtype="bfloat16")
    y, z = (f(params, X, T, {"label": LABEL}) for f in (exact, rough))
    assert z.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(y - z).max() / jnp.abs(y).max()) < 0.1
    apply, shapes = models.abstract(functools.partial(small, dtype="bfloat16"))
    embed = lambda p: apply.merge(p).embed(jnp.asarray(T), {"label": LABEL})
    assert jax.eval_shape(embed, shapes).dtype == jnp.float32


def test_dropout_takes_a_key_for_each_block(monkeypatch):
    apply, shapes = models.abstract(functools.partial(small, dropout=0.5))
    keys = []
    monkeypatch.setattr(edm2.layers, "dropout", lambda x, rate, key: keys.append(key) or x)
    jax.eval_shape(lambda p, key: apply(p, X, T, {"label": LABEL}, key=key), shapes, KEY)
    assert len({id(key) for key in keys}) == len(keys) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size=9 must be divisible by 2"),
        ({"multipliers": ()}, "multipliers"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        (
            {"channels": 20, "head_channels": 12},
            r"heads=3 does not divide channels=40; these do: \[1, 2, 4, 5, 8, 10\]",
        ),
        ({"frequencies": (1.0,)}, "frequencies has 1 entries, needs 16"),
        ({"phases": (1.0,) * 17}, "phases has 17 entries, needs 16"),
        ({"clip": 0.0}, "clip=0.0 must be positive"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(functools.partial(small, **changes))


def test_unknown_size_offers_the_nearest():
    with pytest.raises(ValueError, match=r"'img512-XXXL' is not known. Did you mean 'img512-XXL'"):
        models.edm2_imagenet("img512-XXXL")
