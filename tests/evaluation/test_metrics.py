"""Metrics against brute force, closed forms, and the identical and disjoint cases."""

import itertools

import jax
import numpy as np
import pytest
import scipy.stats

from jdiff.evaluation import metrics


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 7)  # so that every test crosses chunks


def clouds(count_a=23, count_b=31, dim=3, shift=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count_a, dim)), rng.normal(shift, 1, (count_b, dim))


def test_mmd_equals_the_double_loop():
    a, b = clouds()

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3

    def mean(pairs):
        values = [kernel(x, y) for x, y in pairs]
        return sum(values) / len(values)

    expected = (
        mean(itertools.permutations(a, 2))
        + mean(itertools.permutations(b, 2))
        - 2 * mean(itertools.product(a, b))
    )
    assert metrics.mmd2_cubic(a, b) == pytest.approx(expected, rel=1e-10)


def test_mmd_is_unbiased_on_equal_distributions():
    values = [metrics.mmd2_cubic(*clouds(6, 6, shift=0.0, seed=s)) for s in range(2000)]
    mean, error = np.mean(values), np.std(values) / np.sqrt(len(values))
    assert abs(mean) < 3 * error
    # Keeping k(x_i, x_i), the biased estimate, would lie at E[k(x,x) - k(x,y)] / 3: far outside.
    assert error < 0.1


def test_kernel_distance_averages_disjoint_blocks():
    a, b = clouds(400, 500, shift=1.0)
    estimate = metrics.kernel_distance(a, b, block=40)
    whole = metrics.mmd2_cubic(a, b)
    assert abs(estimate.value - whole) < 4 * estimate.deviation
    assert 0 < estimate.deviation < whole
    # Means of blocks of a tenth: the deviation is that of the mean, not of one block.
    again = [metrics.kernel_distance(a, b, block=40, seed=s).value for s in range(20)]
    assert np.std(again) < 2 * estimate.deviation


def brute_radius(x, i, k):
    return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]


def test_precision_and_recall_equal_brute_force():
    real, fake = clouds(shift=1.0)

    def share(queries, members):
        radii = [brute_radius(members, i, 3) for i in range(len(members))]
        hits = [any(np.linalg.norm(q - m) <= r for m, r in zip(members, radii)) for q in queries]
        return np.mean(hits)

    got = metrics.precision_recall(real, fake, k=3)
    assert got.precision == pytest.approx(share(fake, real))
    assert got.recall == pytest.approx(share(real, fake))
    assert got.precision != got.recall


def test_density_and_coverage_equal_brute_force():
    real, fake = clouds(shift=1.0)
    radii = [brute_radius(real, i, 5) for i in range(len(real))]
    inside = np.array([[np.linalg.norm(f - r) < s for r, s in zip(real, radii)] for f in fake])
    got = metrics.density_coverage(real, fake, k=5)
    assert got.density == pytest.approx(inside.sum() / (5 * len(fake)))
    assert got.coverage == pytest.approx(inside.any(0).mean())


def test_identical_sets_are_fully_covered_and_disjoint_sets_not_at_all():
    a, _ = clouds(40)
    assert metrics.precision_recall(a, a) == (1, 1)
    density, coverage = metrics.density_coverage(a, a)
    assert coverage == 1
    assert 1 <= density <= 6 / 5  # a k-th neighbour lies on the sphere, in or out by rounding
    assert metrics.precision_recall(a, a + 1000) == (0, 0)
    assert metrics.density_coverage(a, a + 1000) == (0, 0)


def test_a_memorised_point_has_precision_without_recall():
    a, _ = clouds(40)
    collapsed = a[:1] + 1e-6 * np.random.default_rng(1).normal(size=(40, 3))
    precision, recall = metrics.precision_recall(a, collapsed)
    assert precision == 1
    assert recall <= 1 / 40


def test_neighbours_leave_out_the_sample_but_not_its_duplicates():
    x = np.array([[0.0], [0.0], [1.0], [3.0]])
    np.testing.assert_allclose(metrics.knn_radii(x, 1), [0, 0, 1, 4], atol=1e-12)
    np.testing.assert_allclose(metrics.knn_radii(x, 2), [1, 1, 1, 9], atol=1e-12)


def test_class_score_of_uniform_and_of_one_hot_probabilities():
    assert metrics.class_score(np.full((20, 10), 0.1)) == pytest.approx(1)
    assert metrics.class_score(np.eye(10)[np.arange(50) % 10]) == pytest.approx(10)
    assert metrics.class_score(np.eye(10)[np.zeros(50, int)]) == pytest.approx(1)
    # Two equally likely confident predictions among ten classes.
    assert metrics.class_score(np.eye(10)[[3, 7]]) == pytest.approx(2)


def test_class_score_streams_and_equals_its_definition():
    p = np.random.default_rng(0).dirichlet(np.ones(5), 30)
    divergence = np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])
    parts = [metrics.ClassStatistics.of(part) for part in np.split(p, [4, 11])]
    assert (parts[0] + parts[1] + parts[2]).score == pytest.approx(np.exp(divergence), rel=1e-12)


def test_sliced_wasserstein_of_a_shift():
    key = jax.random.key(0)
    a, _ = clouds(50, dim=8)
    shift = np.arange(8.0)
    # The projected sets are the same up to theta . shift, whatever the transport cost's power.
    along = np.abs(metrics.unit_directions(key, 300, 8) @ shift)
    got = metrics.sliced_wasserstein(a, a + shift, key, projections=300)
    assert got == pytest.approx(np.sqrt(np.mean(along**2)), rel=1e-10)
    first = metrics.sliced_wasserstein(a, a + shift, key, projections=300, p=1)
    assert first == pytest.approx(along.mean(), rel=1e-10)
    # E (theta . shift)^2 = |shift|^2 / D.
    many = metrics.sliced_wasserstein(a, a + shift, key, projections=4000)
    assert many**2 == pytest.approx(shift @ shift / 8, rel=0.1)
    assert metrics.sliced_wasserstein(a, a[::-1], key) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_sets_of_unequal_size_is_exact():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 1)), rng.normal(size=(7, 1))
    got = metrics.sliced_wasserstein(a, b, jax.random.key(0), projections=3, p=1)
    assert got == pytest.approx(scipy.stats.wasserstein_distance(a[:, 0], b[:, 0]), rel=1e-10)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.mmd2_cubic,
        metrics.kernel_distance,
        metrics.precision_recall,
        metrics.density_coverage,
        lambda a, b: metrics.sliced_wasserstein(a, b, jax.random.key(0)),
    ],
)
def test_bad_features_are_refused(metric):
    good = np.random.default_rng(0).normal(size=(20, 3))
    bad = good.copy()
    bad[4, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or inf in 1 rows, the first is row 4"):
        metric(good, bad)
    with pytest.raises(ValueError, match="3 and of 2 dimensions"):
        metric(good, good[:, :2])
    with pytest.raises(ValueError, match="dtype uint8"):
        metric(good, good.astype(np.uint8))
    with pytest.raises(ValueError, match="at least"):
        metric(good[:0], good)


def test_bad_probabilities_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        metrics.class_score(np.ones((2, 2)))
    with pytest.raises(ValueError, match="at least 1 sample"):
        metrics.class_score(np.ones((0, 2)))
