"""Layers against closed forms and scipy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.stats
from flax import nnx

from jdiff.models import initializers, layers


def normals(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_group_norm_is_that_of_float64(offset):
    # An offset of 500 loses E[x^2] - E[x]^2 in float32 altogether.
    x = normals((2, 4, 6, 12)) * np.linspace(0.5, 2, 12, dtype=np.float32) + np.float32(offset)
    scale, bias = normals(12, 1), normals(12, 2)
    groups = x.astype(np.float64).reshape(2, 4, 6, 3, 4)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = groups.var(axis=(1, 2, 4), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
    y = layers.group_norm(jnp.asarray(x), scale, bias, groups=3, eps=1e-5)
    np.testing.assert_allclose(y, expected, atol=2e-6 if not offset else 3e-4)


def test_group_norm_eps_matters_where_the_image_is_flat():
    x = jnp.asarray(1e-3 * normals((1, 8, 8, 4)))
    ratio = []
    for eps in (1e-6, 1e-5):
        y = layers.group_norm(x, jnp.ones(4), jnp.zeros(4), groups=1, eps=eps)
        ratio.append(float(y.std() / math.sqrt(x.var() / (x.var() + eps))))
    np.testing.assert_allclose(ratio, 1.0, rtol=1e-4)


def test_group_norm_keeps_dtype_and_computes_in_float32():
    norm = layers.GroupNorm(8, eps=1e-6, rngs=nnx.Rngs(0))
    x = jnp.asarray(normals((2, 16, 16, 8)), jnp.bfloat16) + 8
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    exact = layers.group_norm(x.astype(jnp.float32), jnp.ones(8), jnp.zeros(8), groups=2, eps=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2**-7)  # one rounding


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (256, 32), (384, 32), (64, 16), (32, 8), (144, 24), (3, 1)]
)
def test_group_count(channels, groups):
    assert layers.group_count(channels) == groups


def test_layer_norm():
    x = normals((2, 5, 16)) * 3 + 100
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x)), expected, atol=2e-5)


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin"])
@pytest.mark.parametrize("endpoint", [False, True])
def test_sinusoidal(order, endpoint):
    times, channels = [0.0, 1.0, 999.0], 8
    out = layers.sinusoidal(jnp.asarray(times), channels, order=order, endpoint=endpoint)
    for row, t in zip(np.asarray(out), times):
        frequencies = [10_000 ** -(i / (3 if endpoint else 4)) for i in range(4)]
        waves = {
            "sin": [math.sin(t * f) for f in frequencies],
            "cos": [math.cos(t * f) for f in frequencies],
        }
        np.testing.assert_allclose(
            row,
            [*waves[order[:3]], *waves[order[4:]]],
            atol=1e-4,  # float32 angles up to 999
        )


def test_sinusoidal_scale_and_dtype():
    t = jnp.asarray([0.25, 0.75])
    scaled = layers.sinusoidal(t, 16, scale=1000.0)
    np.testing.assert_array_equal(scaled, layers.sinusoidal(1000 * t, 16))
    assert layers.sinusoidal(t.astype(jnp.bfloat16), 16).dtype == jnp.float32
    # bfloat16 would give 999 and 1000 one embedding.
    late = layers.sinusoidal(jnp.asarray([999.0, 1000.0]), 16)
    assert jnp.abs(late[0] - late[1]).max() > 0.1


def test_fourier():
    out = layers.fourier(jnp.asarray([0.3]), (1.0, 2.5))
    expected = [f(2 * math.pi * 0.3 * w) for f in (math.sin, math.cos) for w in (1.0, 2.5)]
    np.testing.assert_allclose(out[0], expected, atol=1e-6)


def test_gaussian_frequencies_are_half_normal():
    frequencies = layers.gaussian_frequencies(512)
    distance = scipy.stats.kstest(np.array(frequencies) / 16, scipy.stats.halfnorm.cdf).statistic
    assert distance < 0.002
    assert np.sqrt(np.mean(np.square(frequencies))) == pytest.approx(16, rel=0.01)


def test_grid_embedding_encodes_column_then_row():
    height, width, channels = 2, 3, 8
    table = layers.grid_embedding(height, width, channels)
    for row in range(height):
        for column in range(width):
            expected = []
            for index in (column, row):
                angles = [index * 10_000 ** -(i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[row * width + column], expected, atol=1e-7)
    with pytest.raises(ValueError, match="width=10 must be a multiple of 4"):
        layers.grid_embedding(2, 2, 10)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1), (4, 3, 2, 1)])
def test_resampling_is_that_of_scipy(taps):
    x = normals((2, 6, 8, 3))
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    margin = len(taps) // 2 - 1
    up = np.asarray(layers.upsample(jnp.asarray(x), taps))
    down = np.asarray(layers.downsample(jnp.asarray(x), taps))
    assert up.shape == (2, 12, 16, 3)
    assert down.shape == (2, 3, 4, 3)
    for sample in range(2):
        for channel in range(3):
            image = x[sample, :, :, channel].astype(np.float64)
            full = scipy.signal.correlate2d(np.pad(image, margin), kernel, mode="valid")
            np.testing.assert_allclose(down[sample, :, :, channel], full[::2, ::2], atol=1e-6)
            spread = np.zeros((12, 16))
            spread[::2, ::2] = image
            full = scipy.signal.convolve2d(spread, 4 * kernel)[margin : margin + 12]
            full = full[:, margin : margin + 16]
            np.testing.assert_allclose(up[sample, :, :, channel], full, atol=1e-6)


def test_box_filter_repeats_and_averages():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        layers.upsample(x)[0, :, :, 0], np.kron(x[0, :, :, 0], np.ones((2, 2)))
    )
    np.testing.assert_array_equal(layers.downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


def test_dropout():
    x = jnp.ones((64, 64))
    key = jax.random.key(0)
    dropped = layers.dropout(x, 0.25, key)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(layers.dropout(x, 0.25, None), x)
    np.testing.assert_array_equal(layers.dropout(x, 0.0, key), x)
    assert layers.dropout(x.astype(jnp.bfloat16), 0.25, key).dtype == jnp.bfloat16


def test_conv_is_cross_correlation():
    conv = layers.Conv(2, 1, 3, init=initializers.normal(1.0), rngs=nnx.Rngs(0))
    x = normals((1, 5, 4, 2))
    kernel = np.asarray(conv.kernel[...])
    expected = sum(
        scipy.signal.correlate2d(x[0, :, :, c], kernel[:, :, c, 0], mode="same") for c in range(2)
    )
    np.testing.assert_allclose(conv(jnp.asarray(x))[0, :, :, 0], expected, atol=1e-5)


def test_linear():
    linear = layers.Linear(
        3, 2, init=initializers.normal(1.0), bias_init=initializers.normal(1.0), rngs=nnx.Rngs(0)
    )
    x = normals((4, 3))
    expected = x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, rtol=1e-5)


def test_heads_error_offers_divisors():
    with pytest.raises(ValueError, match=r"heads=5 does not divide width=48.*\[1, 2, 3, 4, 6, 8"):
        layers.check_heads(5, 48, "width")
