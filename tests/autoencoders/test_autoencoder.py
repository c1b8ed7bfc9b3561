"""An autoencoder's units, draws, tiles, slices, memory and complaints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_autoencoder import CHANNELS, FACTOR, toy

from jdiff import models
from jdiff.autoencoders import KL, Moments, Tiny, gaussian
from jdiff.errors import UserError

SHIFT, SCALE = np.asarray([0.3, -0.2]), np.asarray([2.0, 0.5])
IMAGES = np.random.default_rng(0).standard_normal((3, 36, 52, 3), np.float32)


@pytest.fixture(scope="module")
def coder():
    return toy(shift=SHIFT, scale=SCALE)


def test_latents_are_the_networks_shifted_and_scaled(coder):
    mean, std = coder.apply.method("encode")(coder.params, IMAGES)
    found = coder.moments(IMAGES)
    np.testing.assert_allclose(found.mean, (mean - SHIFT) * SCALE, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, std * SCALE, rtol=1e-5)
    images = coder.apply.method("decode")(coder.params, mean)
    np.testing.assert_allclose(coder.decode(found.mean), images, rtol=1e-4, atol=1e-4)


def test_a_draw_has_the_moments_and_depends_on_its_own_key(coder):
    one = np.repeat(IMAGES[:1, :FACTOR, :FACTOR], 4000, axis=0)
    keys = jax.random.split(jax.random.key(1), len(one))
    z, (mean, std) = coder.encode(one, keys), coder.moments(one[:1])
    assert np.abs(z.mean(0) - mean).max() < 5 * std.max() / np.sqrt(len(z))
    assert np.abs(z.std(0) / std - 1).max() < 5 / np.sqrt(2 * len(z))
    again = coder.encode(one, keys[::-1])
    np.testing.assert_array_equal(again, z[::-1])
    np.testing.assert_array_equal(coder.encode(IMAGES), coder.moments(IMAGES).mean)


def test_log_variances_are_clipped():
    parameters = jnp.asarray([1.0, 2.0, 3.0, -100.0, 100.0, 2.0]).reshape(1, 1, 1, 6)
    mean, std = gaussian(parameters)
    np.testing.assert_array_equal(mean.ravel(), [1, 2, 3])
    np.testing.assert_allclose(std.ravel(), np.exp([-15, 10, 1]), rtol=1e-6)


@pytest.mark.parametrize(
    "way",
    [
        lambda c: c.sliced(2),  # does not divide the batch
        lambda c: c.tiled(16),
        lambda c: c.tiled(16, 8).sliced(2),
    ],
)
def test_tiles_and_slices_of_a_local_network_give_the_whole(coder, way):
    whole, parts = coder.moments(IMAGES), way(coder).moments(IMAGES)
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(parts.std, whole.std, rtol=1e-5)
    images = way(coder).decode(whole.mean)
    np.testing.assert_allclose(images, coder.decode(whole.mean), atol=1e-5)


def test_deviations_of_zero_stay_zero_through_tiles(coder):
    """Those of networks that give no distribution: their logarithms are infinite."""
    coder = dataclasses.replace(coder.tiled(16), scale=jnp.zeros(CHANNELS))
    assert not coder.moments(IMAGES).std.any()


def test_gradients_go_through_tiles_and_slices(coder):
    z = coder.encode(IMAGES)
    loss = lambda c, z: jnp.vdot(IMAGES, c.decode(z))
    whole = jax.grad(loss, argnums=1)(coder, z)
    parts = jax.grad(loss, argnums=1)(coder.tiled(16, 8).sliced(2), z)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_tiles_take_one_tiles_memory_whatever_the_number_of_images():
    coder = toy(width=64)

    def temporary(coder, count, side):
        z = jnp.zeros((count, *coder.shape(side, side)))
        program = jax.jit(lambda coder, z: coder.decode(z)).lower(coder, z).compile()
        return program.memory_analysis().temp_size_in_bytes

    image = 32 * 32 * 3 * 4
    one = temporary(coder, 1, 32) + image
    few, many = (temporary(coder.tiled(32), count, 64) for count in (2, 16))
    assert one < many < one + image  # a tile, and no stack of them
    assert many - few < 1000
    assert temporary(coder, 16, 64) > 32 * one


def test_what_does_not_fit_is_said_with_what_would(coder):
    for call, told in {
        lambda: coder.encode(IMAGES[:, :35]): r"35 x 52 is not divisible .* factor 4.*: 36 x 52",
        lambda: coder.shape(2, 9): "2 x 9 .*: 4 x 8",
        lambda: coder.encode(IMAGES[0]): r"\[B, H, W, 3\], not \[36, 52, 3\]",
        lambda: coder.encode(np.zeros((1, 8, 8, 3), np.uint8)): r"not uint8: x / 127.5 - 1",
        lambda: coder.decode(IMAGES): r"\[B, h, w, 2\], not \[3, 36, 52, 3\]",
        lambda: coder.tiled(18): "size=18 must be a multiple .* factor 4.* nearest is 16",
        lambda: coder.tiled(16, 12): "overlap=12 is more than half of size=16; at most 8",
        lambda: coder.sliced(0): "rows=0 must be at least 1",
        lambda: toy(scale=0.0): "scale=0.0 must be positive",
        lambda: toy(shift=[1.0, 2.0, 3.0]): r"shift of shape \[3\] .* 2 channels",
    }.items():
        with pytest.raises(UserError, match=told):
            call()


@pytest.mark.parametrize("model", [KL, Tiny])
def test_networks_compute_in_their_dtype_and_give_float32_moments(model):
    fields = {"widths": (8, 8), "groups": None} if model is KL else {"width": 8}
    apply, params = models.abstract(lambda rngs: model(dtype="bfloat16", rngs=rngs, **fields))
    network = apply.skeleton()
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    moments = jax.eval_shape(apply.method("encode"), params, x)
    side = 16 // network.factor
    assert isinstance(moments, Moments)
    assert {(a.shape, a.dtype) for a in moments} == {((2, side, side, 4), jnp.dtype("float32"))}
    images = jax.eval_shape(apply.method("decode"), params, moments.mean)
    assert images.shape == x.shape and images.dtype == jnp.bfloat16


def test_blocks_are_computed_again_where_remat_says_so():
    def recomputed(remat):
        apply, params = models.abstract(
            lambda rngs: KL(widths=(4, 4), blocks=1, groups=2, remat=remat, rngs=rngs)
        )
        loss = lambda params, z: apply.method("decode")(params, z).sum()
        z = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
        return str(jax.make_jaxpr(jax.grad(loss))(params, z)).count("remat2[")

    assert recomputed(False) == 0
    assert recomputed("full") == 7  # 2 levels of 2 blocks, and the middle's three
