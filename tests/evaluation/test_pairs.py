"""PSNR and SSIM against closed forms, scipy's Gaussian filter, and sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jdiff.errors import UserError
from jdiff.evaluation import pairs


def noisy(shape=(3, 20, 17, 3), seed=0, spread=30):
    """Smooth images uint8, and the same with noise."""
    rng = np.random.default_rng(seed)
    truth = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, shape), (0, 2, 2, 0))
    truth = np.clip((truth - 128) * 4 + 128, 0, 255)
    images = np.clip(truth + rng.normal(0, spread, shape), 0, 255)
    return images.astype(np.uint8), truth.astype(np.uint8)


def test_psnr_of_a_constant_gap():
    truth = np.full((3, 5, 4, 3), 100, np.uint8)
    images = truth + np.array([1, 10, 155], np.uint8)[:, None, None, None]
    wanted = [20 * np.log10(255 / gap) for gap in (1, 10, 155)]
    np.testing.assert_allclose(pairs.psnr(images, truth), wanted, rtol=1e-5)
    # In [-1, 1] the range is 2, and the same images have the same ratio.
    a, b = images / 127.5 - 1, truth / 127.5 - 1
    np.testing.assert_allclose(pairs.psnr(a, b, data_range=2.0), wanted, rtol=1e-5)


def test_psnr_takes_the_mean_before_the_logarithm():
    truth = np.zeros((1, 2, 2, 1), np.uint8)
    images = np.array([0, 0, 0, 20], np.uint8).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(pairs.psnr(images, truth), [20 * np.log10(255 / 10)], rtol=1e-5)


def test_the_truth_itself():
    _, truth = noisy()
    assert np.isposinf(pairs.psnr(truth, truth)).all()
    np.testing.assert_allclose(pairs.ssim(truth, truth), 1.0, rtol=1e-6)


def filtered(x, y, data_range):
    """SSIM by scipy's Gaussian filter (3.5 deviations: 11 x 11), as scikit-image defines it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean = lambda a: scipy.ndimage.gaussian_filter(a, (1.5, 1.5, 0), truncate=3.5)
    m_x, m_y = mean(x), mean(y)
    v_x, v_y, v_xy = mean(x * x) - m_x**2, mean(y * y) - m_y**2, mean(x * y) - m_x * m_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    s = (2 * m_x * m_y + c1) * (2 * v_xy + c2) / ((m_x**2 + m_y**2 + c1) * (v_x + v_y + c2))
    return s[5:-5, 5:-5].mean()


def test_ssim_is_that_of_scipys_filter():
    images, truth = noisy()
    wanted = [filtered(x, y, 255) for x, y in zip(images, truth)]
    assert 0.2 < min(wanted) < 0.95
    np.testing.assert_allclose(pairs.ssim(images, truth), wanted, rtol=2e-5)
    # Of floats the range is what is given, whatever values there are.
    a, b = (images / 255.0).astype(np.float32), (truth / 255.0).astype(np.float32)
    np.testing.assert_allclose(pairs.ssim(a, b, data_range=1.0), wanted, rtol=2e-4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(pairs.ssim(images, truth), wanted, rtol=1e-12)


def test_ssim_of_nearly_flat_bright_images_keeps_its_digits():
    rng = np.random.default_rng(1)
    truth = rng.integers(252, 255, (4, 16, 16, 1)).astype(np.uint8)
    images = rng.integers(251, 255, (4, 16, 16, 1)).astype(np.uint8)
    wanted = [filtered(x, y, 255) for x, y in zip(images, truth)]
    np.testing.assert_allclose(pairs.ssim(images, truth), wanted, rtol=2e-6)


def test_ssim_of_constant_images_is_their_luminance_term():
    a, b, c1 = 200.0, 50.0, 2.55**2
    images, truth = np.full((1, 12, 12, 1), 200, np.uint8), np.full((1, 12, 12, 1), 50, np.uint8)
    np.testing.assert_allclose(
        pairs.ssim(images, truth), [(2 * a * b + c1) / (a**2 + b**2 + c1)], rtol=1e-5
    )


def test_a_window_that_fits_small_images():
    assert [pairs.window_of((n, 64, 3)) for n in (1, 4, 8, 9, 11, 12, 256)] == [
        1, 3, 7, 9, 11, 11, 11,
    ]  # fmt: skip
    images, truth = noisy((2, 8, 8, 1), seed=2)
    weights = np.exp(-0.5 * ((np.arange(7) - 3) / 1.5) ** 2)
    weights = np.outer(weights, weights)
    weights /= weights.sum()
    wanted = []
    for x, y in zip(images[..., 0].astype(float), truth[..., 0].astype(float)):
        places = []
        for i in range(2):
            for j in range(2):
                p, q = x[i : i + 7, j : j + 7], y[i : i + 7, j : j + 7]
                m_p, m_q = (weights * p).sum(), (weights * q).sum()
                v_p, v_q = (weights * (p - m_p) ** 2).sum(), (weights * (q - m_q) ** 2).sum()
                v_pq = (weights * (p - m_p) * (q - m_q)).sum()
                c1, c2 = 2.55**2, 7.65**2
                above = (2 * m_p * m_q + c1) * (2 * v_pq + c2)
                places.append(above / ((m_p**2 + m_q**2 + c1) * (v_p + v_q + c2)))
        wanted.append(np.mean(places))
    np.testing.assert_allclose(pairs.ssim(images, truth), wanted, rtol=1e-5)


def test_order_does_not_matter_and_blur_costs():
    images, truth = noisy((2, 16, 16, 1), seed=3)
    np.testing.assert_allclose(pairs.ssim(images, truth), pairs.ssim(truth, images), rtol=1e-6)
    worse, _ = noisy((2, 16, 16, 1), seed=3, spread=60)
    assert (pairs.ssim(worse, truth) < pairs.ssim(images, truth)).all()


@pytest.mark.parametrize(
    "images,truth,options,message",
    [
        (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8, 3)), {}, "do not compare: [N, H, W, C]"),
        (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8, 1), np.uint8), {}, "both uint8, or both"),
        (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8, 1)), {}, "data_range"),
        (jnp.zeros((2, 8, 8, 1), int), jnp.zeros((2, 8, 8, 1), int), {}, "both uint8, or both"),
    ],
)  # fmt: skip
def test_what_does_not_compare(images, truth, options, message):
    for measure in (pairs.psnr, pairs.ssim):
        with pytest.raises(UserError) as caught:
            measure(images, truth, **options)
        assert message in str(caught.value)


@pytest.mark.parametrize("window", [4, 9, 0])
def test_a_window_that_does_not_fit(window):
    images = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match=f"window={window} given; it is odd and at most 8"):
        pairs.ssim(images, images, window=window)
