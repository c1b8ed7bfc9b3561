"""Streamed Gaussian statistics of features, and the Frechet distance between two of them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean `[D]` and centered second moment `[D, D]` of a set of features, in float64.

    Moments of parts merge exactly into the moments of the whole (Chan, Golub and LeVeque 1979), so
    the features of all images are never held at once, and partial statistics can be saved.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray  # sum over samples of (f - mean)(f - mean)^T

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """The moments of no samples: the neutral element of `+`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of features `[N, D]`. Raises ValueError unless they are finite and 2-D."""
        features = check_features(features).astype(np.float64)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    @property
    def dim(self) -> int:
        """The number of features, D."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance `[D, D]` (division by N - 1, as every published FID)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def __add__(self, other: Moments) -> Moments:
        if self.dim != other.dim:
            raise ValueError(f"moments of {self.dim} and of {other.dim} features cannot be merged")
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = np.outer(delta, delta * (self.count * other.count / count))
        scatter += self.scatter
        scatter += other.scatter
        return Moments(count, mean, scatter)

    def save(self, path: str | pathlib.Path, **extra: np.ndarray) -> None:
        """Writes an .npz file, never half of one to a reader; arrays in `extra` ride along."""
        path = pathlib.Path(path)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            fields = {"count": self.count, "mean": self.mean, "scatter": self.scatter}
            np.savez(file, **fields, **extra)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Moments:
        """Reads what `save` wrote. Raises ValueError for any other file."""
        try:
            with np.load(path) as file:
                return cls(int(file["count"]), file["mean"], file["scatter"])
        except (KeyError, EOFError, ValueError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path}: not a whole file of moments ({error})") from error


def stream(batches: Iterable[np.ndarray], chunk: int = 512) -> Moments:
    """Moments of all features in an iterable of `[B, D]` arrays, merged `chunk` rows at a time."""
    total, rows, held = None, [], 0

    def merged() -> Moments:
        part = Moments.of(np.concatenate(rows))
        return part if total is None else total + part

    for batch in batches:
        rows.append(check_features(batch))
        held += len(rows[-1])
        if held >= chunk:
            total, rows, held = merged(), [], 0
    if total is None and not rows:
        raise ValueError("no batches of features: the iterable is empty")
    return merged() if rows else total


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians.

    The FID when the features are Inception's (Heusel et al. 2017, equation 6). The last trace is
    the sum of the singular values of L_a^T L_b with A = L_a L_a^T and B = L_b L_b^T: all symmetric,
    real by construction, and accurate for singular covariances (fewer samples than features), where
    the square root of the product A B is not. Raises ValueError below 2 samples or for unequal D.
    """
    if a.dim != b.dim:
        raise ValueError(f"Frechet distance between {a.dim} and {b.dim} features: they must agree")
    cov_a, cov_b = a.covariance, b.covariance
    delta = a.mean - b.mean
    overlap = _factor(cov_a).T @ _factor(cov_b)
    cross = np.linalg.svd(overlap, compute_uv=False).sum() if overlap.size else 0.0
    return float(delta @ delta + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L `[D, rank]` with L L^T = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    floor = values[-1] * len(values) * np.finfo(np.float64).eps if len(values) else 0.0
    kept = values > max(floor, 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def check_features(features: np.ndarray, what: str = "features") -> np.ndarray:
    """Returns them as a numpy array `[N, D]`; raises ValueError if not 2-D, floating and finite."""
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"{what} have shape {features.shape}: [N, D] expected")
    if not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"{what} have dtype {features.dtype}: a floating type expected")
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        raise ValueError(f"{what} hold NaN or inf in {len(bad)} rows, the first is row {bad[0]}")
    return features
