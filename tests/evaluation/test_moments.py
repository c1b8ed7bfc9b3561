"""Streamed moments and the Frechet distance against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.linalg

from jdiff.evaluation.moments import Moments, frechet, stream


def gaussian(mean, covariance, count=1000):
    covariance = np.asarray(covariance, float)
    return Moments(count, np.asarray(mean, float), covariance * (count - 1))


def random_covariance(rng, dim, rank=None):
    half = rng.normal(size=(dim, rank or dim))
    return half @ half.T


def test_streamed_moments_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 7)).astype(np.float32) @ rng.normal(size=(7, 7)) + 100
    parts = [x[:1], x[1:300], x[300:300], x[300:]]
    for chunk in (1, 64, 5000):
        moments = stream(iter(parts), chunk)
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-9)


def test_merging_has_a_neutral_element_and_is_symmetric():
    rng = np.random.default_rng(1)
    a, b = (Moments.of(rng.normal(i, 1, (n, 3))) for i, n in ((0, 5), (9, 40)))
    for merged in (a + b, b + a, Moments.empty(3) + a + b):
        assert merged.count == 45
        np.testing.assert_allclose(merged.mean, (a + b).mean, rtol=1e-12)
        np.testing.assert_allclose(merged.scatter, (a + b).scatter, rtol=1e-12)


def test_a_large_offset_costs_no_precision():
    # Sums of raw outer products would lose all digits of the variance here.
    x = np.random.default_rng(2).normal(size=(400, 2))
    moments = stream([x[:150] + 1e8, x[150:] + 1e8], chunk=1)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-5)


def test_saved_moments_come_back_and_a_truncated_file_is_named(tmp_path):
    moments = Moments.of(np.random.default_rng(3).normal(size=(10, 4)))
    path = tmp_path / "m.npz"
    moments.save(path, check=np.uint32(7))
    loaded = Moments.load(path)
    assert loaded.count == 10
    np.testing.assert_array_equal(loaded.mean, moments.mean)
    np.testing.assert_array_equal(loaded.scatter, moments.scatter)
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="m.npz"):
        Moments.load(path)


def test_frechet_of_one_dimensional_gaussians():
    # (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2
    assert frechet(gaussian([1], [[4]]), gaussian([-2], [[9]])) == pytest.approx(10, rel=1e-12)


def test_frechet_of_diagonal_gaussians():
    rng = np.random.default_rng(4)
    (mean_a, mean_b), (std_a, std_b) = rng.normal(size=(2, 6)), rng.uniform(0.1, 3, (2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    got = frechet(gaussian(mean_a, np.diag(std_a**2)), gaussian(mean_b, np.diag(std_b**2)))
    assert got == pytest.approx(expected, rel=1e-12)


def test_frechet_with_a_shared_covariance_is_the_distance_of_the_means():
    rng = np.random.default_rng(5)
    covariance = random_covariance(rng, 20)
    shift = rng.normal(size=20)
    a, b = gaussian(np.zeros(20), covariance), gaussian(shift, covariance)
    assert frechet(a, b) == pytest.approx(shift @ shift, rel=1e-10)
    assert frechet(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_agrees_with_the_matrix_square_root_of_scipy():
    rng = np.random.default_rng(6)
    a, b = (gaussian(rng.normal(size=12), random_covariance(rng, 12)) for _ in range(2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance + b.covariance - 2 * np.real(root))
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_singular_covariances():
    # Rank 1 each: A = u u^T, B = w w^T, tr (A B)^(1/2) = |u.w|.
    rng = np.random.default_rng(7)
    u, w = rng.normal(size=(2, 30))
    expected = u @ u + w @ w - 2 * abs(u @ w)
    zero = np.zeros(30)
    got = frechet(gaussian(zero, np.outer(u, u)), gaussian(zero, np.outer(w, w)))
    assert got == pytest.approx(expected, rel=1e-10)
    # Fewer samples than features, against itself: exactly nothing.
    few = Moments.of(rng.normal(size=(10, 64)))
    assert frechet(few, few) == pytest.approx(0, abs=1e-9)
    constant = gaussian(zero, np.zeros((30, 30)))
    assert frechet(constant, gaussian(zero, np.outer(u, u))) == pytest.approx(u @ u, rel=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[1.0], [np.nan]]), "NaN or inf in 1 rows, the first is row 1"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((3, 2), int), "dtype int64"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(features)


def test_too_few_samples_and_unequal_dimensions_are_refused():
    one, two = Moments.of(np.zeros((1, 2))), Moments.of(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet(one, two)
    with pytest.raises(ValueError, match="between 2 and 3 features"):
        frechet(two, Moments.of(np.zeros((2, 3))))
    with pytest.raises(ValueError, match="cannot be merged"):
        two + Moments.of(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="empty"):
        stream([])
