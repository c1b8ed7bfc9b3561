"""Blur, JPEG and down-up-sampling against scipy, Pillow and jax.image."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from jdiff.cascades.augmentations import blur, down_up, jpeg

RANDOM = np.random.default_rng(1)

augment = jax.jit(lambda augmentation, images, level: augmentation(None, images, level))


def pictures(num, h, w, channels):
    """Noise in front of a slope and an edge: every frequency, differently along both axes."""
    y, x = np.mgrid[:h, :w][..., None] / np.array([h, w]).reshape(2, 1, 1, 1)
    slope = 0.8 * y - 0.5 * x * np.linspace(0.3, 1.0, channels) + 0.5 * (x > 0.6)
    noise = RANDOM.normal(size=(num, h, w, channels))
    noise = 0.5 * scipy.ndimage.gaussian_filter(noise, (0, 0.4, 1.2, 0))
    return np.clip(slope - 0.3 + noise, -1, 1).astype(np.float32)


# Blur.


@pytest.mark.parametrize(("size", "shape"), [(3, (9, 7)), (5, (3, 8))])
def test_blur_is_scipys_with_the_edges_mirrored(size, shape):
    """`mirror` is what torchvision and numpy call reflect: the outermost pixel is not repeated."""
    images = pictures(4, *shape, 2)
    sigma = np.array([0.4, 0.5, 0.6, 3.0], np.float32)
    made = augment(blur(size), jnp.asarray(images), jnp.asarray(sigma))
    for image, s, got in zip(images, sigma, made):
        wanted = scipy.ndimage.gaussian_filter(
            image, s, mode="mirror", radius=size // 2, axes=(0, 1)
        )
        np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_blur_of_a_point_is_the_kernel():
    point = jnp.zeros((1, 7, 7, 1)).at[0, 3, 3, 0].set(1.0)
    line = np.exp(-0.5 * (np.arange(-1, 2) / 0.5) ** 2)
    line /= line.sum()
    made = augment(blur(3), point, 0.5)[0, :, :, 0]
    np.testing.assert_allclose(made[2:5, 2:5], np.outer(line, line), rtol=1e-5)
    np.testing.assert_allclose(made.sum(), 1.0, rtol=1e-6)


def test_blur_of_a_constant_is_that_constant_up_to_the_edge():
    made = augment(blur(3), jnp.full((1, 7, 7, 1), 0.3), 0.6)
    np.testing.assert_allclose(made, 0.3, rtol=1e-6)


# JPEG.

QUALITIES = (100, 95, 75, 50, 49, 30, 10, 1)


def through_pillow(pixels, quality):
    """(what a file of this quality shows, its tables)."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=quality, subsampling=0)
    with Image.open(file) as image:
        return np.asarray(image).reshape(pixels.shape), image.quantization


@pytest.mark.parametrize("shape", [(16, 24, 3), (16, 24, 1), (13, 19, 3)])
def test_jpeg_shows_what_a_file_of_its_quality_shows(shape):
    """libjpeg's transform is in whole numbers: a coefficient near a half may round to the other
    side, so that single blocks differ: of most images, by less than a step of the 8 bits."""
    images = np.round(127.5 + 127.5 * pictures(16, *shape)).astype(np.uint8)
    every = jnp.tile(images / np.float32(127.5) - 1.0, (len(QUALITIES), 1, 1, 1))
    level = jnp.asarray([0.001, *(1.0 - q / 100.0 for q in QUALITIES[1:])])  # 0 is the identity
    made = np.asarray(127.5 + 127.5 * augment(jpeg(1, 100), every, level.repeat(16)))
    np.testing.assert_allclose(made, np.round(made), atol=1e-4)  # 8 bits
    made = made.reshape(-1, *images.shape)
    for quality, got in zip(QUALITIES, made):
        shown = np.stack([through_pillow(image, quality)[0] for image in images])
        assert np.median(np.abs(got - shown).mean((1, 2, 3))) < 0.75, quality
    lost = np.abs(made - images).mean((1, 2, 3, 4))
    assert (np.diff(lost) > 0).all() and lost[0] < 0.75 and lost[-1] > 15


def test_jpegs_tables_are_those_of_the_files():
    from jdiff.cascades.augmentations.jpeg import _tables

    made = np.asarray(_tables(1.0 - jnp.asarray(QUALITIES) / 100.0, 3))
    pixels = np.zeros((8, 8, 3), np.uint8)
    for quality, tables in zip(QUALITIES, made):
        _, wanted = through_pillow(pixels, quality)
        np.testing.assert_array_equal(tables[..., 0].ravel(), wanted[0])
        np.testing.assert_array_equal(tables[..., 1].ravel(), wanted[1])
        np.testing.assert_array_equal(tables[..., 2].ravel(), wanted[1])


def test_jpeg_clips_to_8_bits():
    made = augment(jpeg(), jnp.full((1, 8, 8, 3), 1.5), 0.2)
    np.testing.assert_allclose(made, 1.0, atol=1e-6)


# Down and up.

SIDE = (12, 10)
IMAGES = jnp.asarray(pictures(4, *SIDE, 2))
OCTAVES = np.array([0.3, 1.0, 1.7, 5.0], np.float32)
SMALL = [(10, 8), (6, 5), (4, 3), (1, 1)]
FILTERS = [("area", "bilinear"), ("bilinear", "nearest"), ("bicubic", "bicubic")]


def area(n, m):
    """Means of m equal parts of n pixels, by way of n m small ones."""
    return np.kron(np.eye(m), np.full(n, 1 / n)) @ np.kron(np.eye(n), np.ones((m, 1)))


@pytest.mark.parametrize(("down", "up"), FILTERS)
def test_down_up_is_two_of_jaxs_resizes(down, up):
    made = augment(down_up(down=down, up=up), IMAGES, jnp.asarray(OCTAVES))
    for image, size, got in zip(IMAGES, SMALL, made):
        if down == "area":
            small = np.einsum("ih,jw,hwc->ijc", *map(area, SIDE, size), image)
        else:
            small = jax.image.resize(image, (*size, 2), down, antialias=True)
        wanted = jax.image.resize(jnp.asarray(small, jnp.float32), image.shape, up)
        np.testing.assert_allclose(got, wanted, atol=3e-6)


def test_area_by_a_whole_factor_is_the_mean_of_its_pixels():
    made = augment(down_up(down="area", up="nearest"), IMAGES, jnp.ones(4))
    means = np.asarray(IMAGES).reshape(4, 6, 2, 5, 2, 2).mean((2, 4))
    np.testing.assert_allclose(made, means.repeat(2, 1).repeat(2, 2), atol=1e-6)


@pytest.mark.parametrize(("down", "up"), FILTERS)
def test_down_up_keeps_a_constant(down, up):
    made = augment(down_up(down=down, up=up), jnp.full_like(IMAGES, 0.4), jnp.asarray(OCTAVES))
    np.testing.assert_allclose(made, 0.4, atol=1e-6)
