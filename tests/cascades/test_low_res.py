"""The low-resolution input: made smaller, augmented and told, in training as in sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import UserError, denoisers, schedules
from jdiff.cascades import augmentations, cascade, low_res, stage
from jdiff.cascades.low_res import DOWN, UP
from jdiff.models.low_res import enlarge
from jdiff.predictions import from_x0

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (5, 12, 12, 3), minval=-1.0)
EDM = schedules.edm()


def test_area_is_the_mean_of_each_cell():
    wanted = np.asarray(IMAGES).reshape(5, 4, 3, 4, 3, 3).mean((2, 4))
    np.testing.assert_allclose(low_res(3).shrink(IMAGES), wanted, rtol=1e-5, atol=1e-6)


def test_area_in_two_steps_is_area_in_one():
    twice = low_res(3).shrink(low_res(2).shrink(IMAGES))
    np.testing.assert_allclose(twice, low_res(6).shrink(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("down", DOWN)
def test_a_flat_image_stays_flat(down):
    small = low_res(2, down=down).shrink(jnp.full((1, 12, 8, 1), 0.3))
    assert small.shape == (1, 6, 4, 1)
    np.testing.assert_allclose(small, 0.3, rtol=1e-6)


@pytest.mark.parametrize("down", ["bilinear", "bicubic"])
def test_what_a_small_image_cannot_hold_does_not_fold_back(down):
    """Stripes of one pixel: a filter that is not widened would make stripes or a tint of them."""
    stripes = jnp.tile(jnp.asarray([1.0, -1.0]), 12)[None, :, None, None] * jnp.ones((1, 24, 24, 1))
    assert np.abs(low_res(3, down=down).shrink(stripes)[:, 2:-2]).max() < 0.15
    assert np.abs(low_res(3, down="nearest").shrink(stripes)[:, 2:-2]).min() == 1.0


def test_a_factor_that_is_not_whole():
    assert low_res(1.5, down="bicubic").shrink(IMAGES).shape == (5, 8, 8, 3)


@pytest.mark.parametrize("up", UP)
def test_it_enlarges_as_the_network_does(up):
    low = low_res(2, up=up)
    small = low.shrink(IMAGES)
    np.testing.assert_array_equal(low.enlarge(small, IMAGES.shape), enlarge(small, (12, 12), up))


def test_training_has_a_level_and_noise_for_each_sample():
    low = low_res(2, augmentations.gaussian(schedules.cosine(), 0.2, 0.9))
    images = jnp.tile(IMAGES[:1], (400, 1, 1, 1))
    x0, cond = low.training(KEY, images)
    np.testing.assert_array_equal(x0, images)
    s = np.asarray(cond["aug_level"], np.float64)
    assert s.min() >= 0.2 and s.max() <= 0.9 and len(set(s)) == 400
    np.testing.assert_allclose([s.mean(), s.std()], [0.55, 0.7 / 12**0.5], atol=0.04)
    a, b = (f(np.pi * s / 2)[:, None, None, None] for f in (np.cos, np.sin))
    eps = (np.asarray(cond["low_res"]) - a * np.asarray(low.shrink(images))) / b  # its own level's
    np.testing.assert_allclose([eps.mean(), eps.std()], [0.0, 1.0], atol=0.02)
    apart = np.corrcoef(eps.reshape(400, -1)) - np.eye(400)
    assert np.abs(apart).max() < 0.6  # 400 independent draws of 108 numbers


def test_an_input_that_is_not_augmented_tells_no_level():
    x0, cond = low_res(2).training(KEY, IMAGES)
    assert set(cond) == {"low_res"}
    np.testing.assert_array_equal(cond["low_res"], low_res(2).shrink(IMAGES))
    np.testing.assert_array_equal(x0, IMAGES)


def test_a_residual_is_taken_off_and_put_back():
    low = low_res(2, augmentations.gaussian(), residual=True)
    x0, cond = low.training(KEY, IMAGES)
    base = enlarge(cond["low_res"], (12, 12))
    np.testing.assert_allclose(x0, IMAGES - base, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(low.finish(x0, cond), IMAGES, rtol=1e-5, atol=1e-6)


KINDS = {
    "gaussian": (augmentations.gaussian(), 0.3),
    "blur": (augmentations.blur(), 0.5),
    "chain": (augmentations.chain(augmentations.blur(), augmentations.gaussian()), (0.5, 0.3)),
}


def _echo(x, t, cond):
    """A denoiser that sees nothing but its input."""
    large = jnp.repeat(jnp.repeat(cond["low_res"], 2, 1), 2, 2)
    return from_x0(EDM, x, large, t)


@jax.jit
def _trained(low, keys, x0, level):
    """The input within a step of training, with something before and something after."""
    cond = low.condition(keys, low.shrink(x0), level)
    return cond, jnp.square(jnp.tanh(cond["low_res"]) - low.shrink(x0)).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_augments_as_training_bit_for_bit(kind):
    augmentation, level = KINDS[kind]
    low = low_res(2, augmentation)
    denoise = denoisers.function(_echo, EDM)
    times, images = jnp.asarray([1.0, 0.0]), IMAGES[:, :8, :8]
    base = stage(denoise, times=times, shape=(4, 4, 3))
    up = stage(denoise, times=times, shape=(8, 8, 3), low_res=low, level=level)
    small = low.shrink(images)
    sampled = cascade(base, up).upsample(KEY, 1, small)[:, ::2, ::2]

    keys = up.augmentation_keys(jax.random.fold_in(KEY, 1), jnp.arange(5))
    levels = jax.tree.map(lambda s: jnp.full(5, s), level)
    trained, _ = _trained(low, keys, images, levels)
    np.testing.assert_array_equal(sampled, trained["low_res"])
    by_hand = low.condition(keys, small, level)["low_res"]  # outside of any program
    np.testing.assert_array_equal(by_hand, trained["low_res"])
    assert np.abs(sampled - small).max() > 0.01

    one, _ = _trained(low, keys[2:3], images[2:3], jax.tree.map(lambda s: s[2:3], levels))
    alone, row = one["low_res"], trained["low_res"][2:3]  # XLA computes single rows otherwise
    np.testing.assert_allclose(alone, row, rtol=1e-6, atol=1e-6)
    clean, _ = _trained(low, keys, images, jax.tree.map(jnp.zeros_like, levels))
    np.testing.assert_array_equal(clean["low_res"], small)  # level 0 is the identity


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: low_res(1), "factor=1 above"),
        (lambda: low_res(1.5), "factor=1.5 whole area"),
        (lambda: low_res(2, down="aera"), "down aera 'area'"),
        (lambda: low_res(2, up="bicubik"), "up 'bicubic'"),
        (lambda: low_res(2, augmentations.gaussian), "augmentation=gaussian call"),
        (lambda: low_res(5).shrink(IMAGES), "factor=5 12 x 12"),
    ],
)
def test_what_it_refuses(make, words):
    with pytest.raises(UserError) as error:
        make()
    for word in words.split():
        assert word in str(error.value)
