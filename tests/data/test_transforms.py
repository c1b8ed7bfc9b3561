"""Crop, resize, mirror and their random numbers against closed forms."""

import numpy as np
import pytest

from jdiff.data import transforms
from jdiff.errors import UserError


def _noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _splitmix(state):
    """One output of SplitMix64 in Python integers."""
    word = (state + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_hash_is_chained_splitmix64():
    assert _splitmix(1234567) == 6457827717110365317  # the published first output of that seed
    positions = np.asarray([0, 1, 5, 2**40])
    found = transforms.hashed(2**62 + 3, positions, 7).tolist()
    chain = [
        _splitmix((_splitmix((_splitmix(2**62 + 3) + 7) % 2**64) + p) % 2**64)
        for p in positions.tolist()
    ]
    assert found == chain


def test_uniform_numbers_are_uniform_and_unrelated():
    n = 200_000
    u = transforms.uniform(0, np.arange(n), 1)
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert np.sum((counts - n / 50) ** 2 / (n / 50)) < 86  # chi-squared, 49 d.o.f.: p = 0.001
    assert u.min() >= 0 and u.max() < 1
    for other in (
        transforms.uniform(1, np.arange(n), 1),
        transforms.uniform(0, np.arange(n), 2),
        transforms.uniform(0, np.arange(n) + 1, 1),
    ):
        assert abs(np.corrcoef(u, other)[0, 1]) < 4 / np.sqrt(n)


def test_mirror_reverses_columns_of_the_marked_images_only():
    images = _noise(3, 4, 5, 2)
    out = transforms.mirror(images, np.asarray([True, False, True]))
    for b, h, w, c in np.ndindex(images.shape):
        source = 4 - w if b != 1 else w
        assert out[b, h, w, c] == images[b, h, source, c]


@pytest.mark.parametrize("resample", transforms.FILTERS)
@pytest.mark.parametrize("size", [(5, 9), (24, 40)])
def test_a_constant_image_stays_constant(resample, size):
    image = np.full((12, 20, 3), (7, 130, 255), np.uint8)
    out = transforms.resize(image, size, resample)
    assert out.shape == (*size, 3) and out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.broadcast_to(image[0, 0], out.shape))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_box_is_the_area_average(factor):
    image = _noise(4 * factor, 6 * factor, 3)
    mean = image.reshape(4, factor, 6, factor, 3).mean(axis=(1, 3))
    out = transforms.resize(image, (4, 6), "box")
    assert np.abs(out - mean).max() <= 1.0  # Pillow rounds after each axis


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos", "box"])
def test_a_linear_ramp_keeps_its_place(resample):
    # Pixel j covers [j, j + 1): the centre of output pixel j lies at 4 (j + 1/2) - 1/2.
    columns = np.arange(64)
    image = np.broadcast_to((3 * columns + 20).astype(np.uint8)[None, :, None], (64, 64, 1))
    out = transforms.resize(image, (16, 16), resample)[:, :, 0].astype(float)
    expected = 3 * (4 * (np.arange(16) + 0.5) - 0.5) + 20
    inside = slice(3, 13)  # the filters reach at most 3 output pixels
    assert np.abs(out - expected)[:, inside].max() <= 1.0  # nearest is 1.5 off, align_corners 5.6


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_downsampling_is_antialiased(resample):
    board = (np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    out = transforms.resize(board, (8, 8), resample)[2:-2, 2:-2].astype(int)
    assert np.abs(out - 127.5).max() < 8  # without a low-pass filter: 0 or 255


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels_are_resized_alone(channels):
    image = _noise(12, 20, channels)
    out = transforms.resize(image, (6, 5), "bicubic")
    for c in range(channels):
        alone = transforms.resize(np.repeat(image[..., c : c + 1], 3, -1), (6, 5), "bicubic")
        np.testing.assert_array_equal(out[..., c], alone[..., 1])


def test_centre_crop():
    image = _noise(7, 12, 3)
    np.testing.assert_array_equal(transforms.crop(image, "center", None, 0, 0), image[:, 2:9])
    tall = _noise(12, 7, 3)
    np.testing.assert_array_equal(transforms.crop(tall, "center", None, 0, 0), tall[2:9])


def test_adm_crop_of_a_power_of_two_is_the_area_average_of_the_centre():
    image = _noise(32, 56, 3)
    out = transforms.crop(image, "adm", 8, 0, 0)
    mean = image.reshape(8, 4, 14, 4, 3).mean(axis=(1, 3))
    assert out.shape == (8, 8, 3)
    assert np.abs(out - mean[:, 3:11]).max() <= 2.0  # four roundings


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (8, 9), (5, 30)])
def test_adm_crop_is_centred_and_of_its_size(shape):
    # A ramp through the centre keeps its middle value at the centre of the crop.
    ramp = np.linspace(0, 250, shape[1])[None, :, None].repeat(shape[0], 0).repeat(3, 2)
    out = transforms.crop(np.rint(ramp).astype(np.uint8), "adm", 8, 0, 0)
    assert out.shape == (8, 8, 3)
    step = 250 / shape[1] * min(shape) / 8  # grey levels in one output pixel
    assert abs(out.mean() - 125) <= step + 2


@pytest.mark.parametrize("kind,side", [("random", 5), ("patch", 3)])
def test_random_crops_reach_every_place_equally(kind, side):
    image = np.arange(5 * 8, dtype=np.uint8).reshape(5, 8, 1)
    n = 6000
    u, v = transforms.uniform(0, np.arange(n), 2), transforms.uniform(0, np.arange(n), 3)
    places = {}
    for a, b in zip(u, v):
        out = transforms.crop(image, kind, side, a, b)
        top, left = divmod(int(out[0, 0, 0]), 8)
        np.testing.assert_array_equal(out, image[top : top + side, left : left + side])
        places[top, left] = places.get((top, left), 0) + 1
    expected = (5 - side + 1) * (8 - side + 1)
    assert len(places) == expected
    each = n / expected
    assert max(abs(c - each) for c in places.values()) < 5 * np.sqrt(each)


def test_errors_say_what_to_do():
    with pytest.raises(UserError, match="Did you mean 'lanczos'"):
        transforms.resize(_noise(4, 4, 3), (2, 2), "lanzcos")
    with pytest.raises(UserError, match="4 x 9 pixels"):
        transforms.crop(_noise(4, 9, 3), "patch", 8, 0, 0)
