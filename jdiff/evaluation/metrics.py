"""Distances and coverage between two sets of features `[N, D]`, on host in float64, in chunks.

Beside the Frechet distance (in `moments`, which streams): kernel distance, improved precision and
recall, density and coverage, sliced Wasserstein distance; and the class score of probabilities.
Every function raises ValueError for features that are not finite floating `[N, D]`, too few, or of
unequal D. Memory is O(N D) for the input and O(chunk N) for the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jdiff.evaluation.moments import check_features

_CHUNK = 1024


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    deviation: float


def kernel_distance(a: np.ndarray, b: np.ndarray, *, block: int = 1000, seed: int = 0) -> Estimate:
    """Squared maximum mean discrepancy, unbiased, cubic kernel; the KID on Inception features.

    The mean over disjoint random blocks of `block` samples (of fewer where the sets are small, so
    that there are ten), with the standard error of that mean. Binkowski et al. 2018, section 4.
    """
    a, b = _pair(a, b, least=4)
    size = min(len(a), len(b))
    count = min(max(10, size // block), size // 2)
    block = size // count
    rng = np.random.default_rng(seed)
    rows_a, rows_b = rng.permutation(len(a)), rng.permutation(len(b))
    parts = [slice(i * block, (i + 1) * block) for i in range(count)]
    values = [mmd2_cubic(a[rows_a[s]], b[rows_b[s]]) for s in parts]
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(count)))


def mmd2_cubic(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of all samples under k(x, y) = (x.y / D + 1)^3; may be negative."""
    a, b = _pair(a, b)

    def total(x, y):
        return sum(((part @ y.T / x.shape[1] + 1) ** 3).sum() for part in _chunks(x))

    def self_mean(x):
        own = (((x**2).sum(1) / x.shape[1] + 1) ** 3).sum()  # k(x_i, x_i) is left out
        return (total(x, x) - own) / (len(x) * (len(x) - 1))

    return float(self_mean(a) + self_mean(b) - 2 * total(a, b) / (len(a) * len(b)))


class PrecisionRecall(NamedTuple):
    """Share of generated samples near real ones, and of real samples near generated ones."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    A sample is near a set if it lies within the distance of any of its members to that member's
    k-th nearest neighbour in the set.
    """
    real, generated = _pair(real, generated, least=k + 1)

    def share(queries, members):
        radii = knn_radii(members, k)
        near = [(d <= radii).any(1) for d in _distances(queries, members)]
        return float(np.concatenate(near).mean())

    return PrecisionRecall(share(generated, real), share(real, generated))


class DensityCoverage(NamedTuple):
    """How densely real neighbourhoods are visited, and the share of them that is visited."""

    density: float
    coverage: float


def density_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, equations 4 and 6), on open balls as their code.

    Density counts, for each generated sample, the real samples whose k-nearest-neighbour ball holds
    it, over k; it may exceed 1. Coverage is the share of real balls that hold a generated sample.
    """
    real, generated = _pair(real, generated, least=k + 1)
    radii = knn_radii(real, k)
    inside, visited = 0, np.zeros(len(real), bool)
    for d in _distances(generated, real):
        hit = d < radii
        inside += int(hit.sum())
        visited |= hit.any(0)
    return DensityCoverage(inside / (k * len(generated)), float(visited.mean()))


def knn_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance `[N]` of each sample to its k-th nearest other sample."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} samples have no {k}-th nearest neighbour")
    radii = []
    start = 0
    for d in _distances(x, x):
        rows = np.arange(len(d))
        d[rows, start + rows] = -1.0  # itself comes first, also among its duplicates
        radii.append(np.maximum(np.partition(d, k, axis=1)[:, k], 0))
        start += len(d)
    return np.concatenate(radii)


def sliced_wasserstein(
    a: np.ndarray, b: np.ndarray, key: jax.Array, *, projections: int = 512, p: float = 2.0
) -> float:
    """(mean over random unit directions of W_p^p of the projected sets)^(1/p), Bonneel et al. 2015.

    Each one-dimensional distance is exact, also for sets of unequal size.
    """
    a, b = _pair(a, b, least=1)
    thetas = unit_directions(key, projections, a.shape[1])
    cuts = np.unique(np.concatenate([np.arange(1, len(a)) / len(a), np.arange(1, len(b)) / len(b)]))
    edges = np.concatenate([[0.0], cuts, [1.0]])
    middle = (edges[1:] + edges[:-1]) / 2  # both quantile functions are constant in between
    at_a, at_b = (np.minimum((middle * len(x)).astype(int), len(x) - 1) for x in (a, b))
    weight = np.diff(edges)[:, None]
    total = 0.0
    for part in _chunks(thetas, 64):
        quantiles_a, quantiles_b = np.sort(a @ part.T, 0)[at_a], np.sort(b @ part.T, 0)[at_b]
        total += float((weight * np.abs(quantiles_a - quantiles_b) ** p).sum())
    return (total / projections) ** (1 / p)


def unit_directions(key: jax.Array, count: int, dim: int) -> np.ndarray:
    """`count` directions `[count, dim]`, uniform on the sphere, float64."""
    normal = np.asarray(jax.random.normal(key, (count, dim)), np.float64)
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class ClassStatistics:
    """Streamed statistics of class probabilities; parts add up to the whole.

    Attributes:
      count: number of samples.
      total: sum of their probabilities, `[K]`.
      negentropy: sum over samples of sum_k p_k log p_k.
    """

    count: int
    total: np.ndarray
    negentropy: float

    @classmethod
    def of(cls, probabilities: np.ndarray) -> ClassStatistics:
        """Raises ValueError unless rows of `[N, K]` are non-negative and sum to 1."""
        p = check_features(probabilities, "probabilities").astype(np.float64)
        if (p < 0).any() or (np.abs(p.sum(1) - 1) > 1e-3).any():
            raise ValueError("probabilities have rows that are negative or do not sum to 1")
        return cls(len(p), p.sum(0), float(_p_log_p(p).sum()))

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        if self.total.shape != other.total.shape:
            raise ValueError(f"{len(self.total)} classes and {len(other.total)} cannot be merged")
        return ClassStatistics(
            self.count + other.count, self.total + other.total, self.negentropy + other.negentropy
        )

    @property
    def score(self) -> float:
        """exp E KL(p(y|x) || p(y)), from 1 to the number of classes (Salimans et al. 2016).

        This is the Inception Score only when the probabilities are that network's.
        """
        if self.count < 1:
            raise ValueError("a class score needs at least 1 sample, got 0")
        marginal = self.total / self.count
        return float(np.exp(self.negentropy / self.count - _p_log_p(marginal).sum()))


def class_score(probabilities: np.ndarray) -> float:
    """`ClassStatistics.score` of probabilities `[N, K]` held at once."""
    return ClassStatistics.of(probabilities).score


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))


def _pair(a: np.ndarray, b: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = check_features(a), check_features(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions do not compare")
    if min(len(a), len(b)) < least:
        raise ValueError(f"at least {least} samples of each are needed, got {len(a)} and {len(b)}")
    return a.astype(np.float64), b.astype(np.float64)


def _chunks(x: np.ndarray, size: int = _CHUNK) -> Iterator[np.ndarray]:
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _distances(queries: np.ndarray, members: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances `[chunk, M]`, centered first so that little cancels."""
    center = members.mean(0)
    members = members - center
    norms = (members**2).sum(1)
    for part in _chunks(queries):
        part = part - center
        yield np.maximum((part**2).sum(1)[:, None] + norms - 2 * part @ members.T, 0)
