"""Evaluation of generated images: every figure between its floor and its ceiling.

A distance alone says little: `evaluate` puts the figure of the samples beside that of the training
split against the same held-out images (the floor: real images do no better) and that of noise (the
ceiling). Images stream through once; only statistics and a bounded sample of features stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jdiff.errors import choose
from jdiff.evaluation import metrics as distances
from jdiff.evaluation.features import Extractor, check_images, pixels
from jdiff.evaluation.moments import Moments, check_features, frechet

METRICS = (
    "frechet",
    "kernel",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "sliced",
    "accuracy",
)
KEEP = 10_000  # features kept for the metrics that compare samples one by one

Batches = Iterable[tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is kept of a set of images; make it with `summarize`.

    Attributes:
      features: name of the space.
      shape: (H, W, C) of an image.
      moments: of all features.
      kept: features `[<= KEEP, D]`, a uniform sample of all.
      pixels: the same images' pixels in [-1, 1], `[<= KEEP, H * W * C]`.
      classes: statistics of the class probabilities, or None.
      hits, labelled: images of each intended class in which the classifier found it, and images
        with that label, int64 `[K]`; None without labels or classifier.
    """

    features: str
    shape: tuple[int, int, int]
    moments: Moments
    kept: np.ndarray
    pixels: np.ndarray
    classes: distances.ClassStatistics | None = None
    hits: np.ndarray | None = None
    labelled: np.ndarray | None = None


class Summarizer:
    """Makes a `Summary` of images that come a batch at a time, as several sets may at once."""

    def __init__(
        self, features: Extractor, probabilities: Callable[[np.ndarray], np.ndarray] | None = None,
        *, shape: tuple[int, int, int] | None = None, keep: int = KEEP, seed: int = 0,
    ):  # fmt: skip
        """See `summarize`."""
        self._features, self._probabilities, self._shape = features, probabilities, shape
        self._rng = np.random.default_rng(seed)
        self._kept, self._flat = _Reservoir(keep), _Reservoir(keep)
        self._moments = self._classes = self._tally = self._space = None

    def add(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Takes uint8 images `[B, H, W, C]` in, and their int labels `[B]` if they have some.

        Raises ValueError for images that are not uint8 or differ in shape, labels out of range, or
        features that are not finite.
        """
        images = check_images(images)
        if not len(images):
            return
        self._shape = shape = tuple(self._shape or images.shape[1:])
        if images.shape[1:] != shape:
            raise ValueError(f"images {images.shape[1:]} among, or compared with, images {shape}")
        self._space = self._space or pixels(shape)
        rows = check_features(self._features(images), f"features {self._features.name!r}")
        self._moments = _sum(self._moments, Moments.of(rows))
        places = self._kept.places(len(rows), self._rng)
        self._kept.put(rows, places)
        self._flat.put(self._space(images), places)
        if self._probabilities is None:
            return
        p = np.asarray(self._probabilities(images))
        self._classes = _sum(self._classes, distances.ClassStatistics.of(p))
        if labels is not None:
            self._tally = _sum(self._tally, _tally(p, np.asarray(labels)))

    def summary(self) -> Summary:
        """Of all that was taken in. Raises ValueError for fewer than two images."""
        moments = self._moments
        if moments is None or moments.count < 2:
            raise ValueError(f"at least 2 images are needed, got {moments.count if moments else 0}")
        hits, labelled = (None, None) if self._tally is None else self._tally
        return Summary(
            self._features.name, self._shape, moments, self._kept.rows, self._flat.rows,
            self._classes, hits, labelled,
        )  # fmt: skip


def summarize(
    batches: Batches,
    features: Extractor,
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    shape: tuple[int, int, int] | None = None,
    keep: int = KEEP,
    seed: int = 0,
) -> Summary:
    """Streams (uint8 images `[B, H, W, C]`, int labels `[B]` or None) batches into a `Summary`.

    `probabilities` maps images to class probabilities `[B, K]`; `shape` is the (H, W, C) that every
    image has to have, by default that of the first. Raises ValueError for fewer than
    two images, images that are not uint8, labels out of range, or features that are not finite.
    """
    made = Summarizer(features, probabilities, shape=shape, keep=keep, seed=seed)
    for images, labels in batches:
        made.add(images, labels)
    return made.summary()


def compare(
    generated: Summary, reference: Summary, metrics: Iterable[str] = METRICS, *, seed: int = 0
) -> dict[str, Any]:
    """The chosen metrics of one set of images against another, as a flat dict of numbers.

    Keys: frechet, kernel and kernel_deviation, precision, recall, density, coverage,
    inception_score, sliced, accuracy and accuracy_per_class (NaN for a class without samples).
    Class metrics are left out where the summary has no probabilities or labels.
    """
    metrics = check_metrics(metrics)
    if generated.features != reference.features:
        raise ValueError(
            f"features {generated.features!r} and {reference.features!r} do not compare"
        )
    if generated.shape != reference.shape:
        raise ValueError(f"images {generated.shape} and {reference.shape} do not compare")
    out: dict[str, Any] = {}
    if "frechet" in metrics:
        out["frechet"] = frechet(generated.moments, reference.moments)
    if "kernel" in metrics:
        estimate = distances.kernel_distance(generated.kept, reference.kept, seed=seed)
        out["kernel"], out["kernel_deviation"] = estimate
    if "precision_recall" in metrics:
        out |= distances.precision_recall(reference.kept, generated.kept)._asdict()
    if "density_coverage" in metrics:
        out |= distances.density_coverage(reference.kept, generated.kept)._asdict()
    if "inception_score" in metrics and generated.classes is not None:
        out["inception_score"] = generated.classes.score
    if "sliced" in metrics:
        key = jax.random.key(seed)
        out["sliced"] = distances.sliced_wasserstein(generated.pixels, reference.pixels, key)
    if "accuracy" in metrics and generated.hits is not None:
        out["accuracy"] = float(generated.hits.sum() / generated.labelled.sum())
        with np.errstate(invalid="ignore"):
            out["accuracy_per_class"] = (generated.hits / generated.labelled).tolist()
    return out


def evaluate(
    samples: Batches,
    reference: Batches,
    *,
    features: Extractor,
    metrics: Iterable[str] = METRICS,
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None,
    training: Batches | None = None,
    noise: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures generated images against held-out ones, beside floor and ceiling.

    Args:
      samples: (uint8 images, intended labels or None) batches of generated images.
      reference: the held-out split, likewise.
      features: the space in which the sets are compared.
      metrics: some of `METRICS`.
      probabilities: images to class probabilities `[B, K]`; for inception_score and accuracy.
      training: the training split, whose figures are the floor of the distances.
      noise: whether images of uniform noise, as many as samples, are measured as the ceiling.
      seed: of the noise, the kept sample and the random projections.

    Returns:
      {"features", "num", "num_reference", "metrics": {name: {"value", "floor", "ceiling"}}}, with
      the names of `compare`; an entry is None where it was not measured.

    Raises:
      UserError: an unknown metric; the nearest known one is offered.
      ValueError: as `summarize`.
    """
    metrics = check_metrics(metrics)

    held_out = summarize(reference, features, probabilities, seed=seed)

    def summary(batches: Batches) -> Summary:
        return summarize(batches, features, probabilities, shape=held_out.shape, seed=seed)

    drawn = summary(samples)
    sets: dict[str, Summary] = {"value": drawn}
    if training is not None:
        sets["floor"] = summary(training)
    if noise:
        sets["ceiling"] = summary(noise_batches(drawn.shape, drawn.moments.count, seed=seed))
    return {
        "features": features.name,
        "num": drawn.moments.count,
        "num_reference": held_out.moments.count,
        "metrics": side_by_side(sets, held_out, metrics, seed=seed),
    }


def side_by_side(
    sets: Mapping[str, Summary], reference: Summary, metrics: Iterable[str] = METRICS, *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """{name of the metric: {name of the set: its figure against `reference`}}.

    The metrics are those of the set "value"; a further set has None where it has no figure, and so
    has "floor" or "ceiling" if there is no such set.
    """
    metrics = check_metrics(metrics)
    figures = {name: compare(s, reference, metrics, seed=seed) for name, s in sets.items()}
    places = list(dict.fromkeys(["value", "floor", "ceiling", *sets]))
    return {
        name: {place: figures.get(place, {}).get(name) for place in places}
        for name in figures["value"]
    }


def noise_batches(
    shape: tuple[int, int, int], num: int, *, seed: int = 0, kind: str = "uniform", batch: int = 256
) -> Iterator[tuple[np.ndarray, None]]:
    """`num` uint8 noise images `shape`: `uniform` in 0..255, or `gaussian` around 128 (std 64)."""
    choose("noise", kind, ("uniform", "gaussian"))
    rng = np.random.default_rng(seed)
    for start in range(0, num, batch):
        size = (min(batch, num - start), *shape)
        if kind == "uniform":
            yield rng.integers(0, 256, size, np.uint8), None
        else:
            yield np.clip(rng.normal(128, 64, size), 0, 255).astype(np.uint8), None


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple, if all are known; raises UserError with the nearest one otherwise."""
    return tuple(choose("metric", name, METRICS) for name in names)


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a + b


def _tally(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    classes = probabilities.shape[1]
    if labels.shape != probabilities.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels {labels.dtype} {labels.shape}: int [{len(probabilities)}] expected"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels span {labels.min()}..{labels.max()}: 0..{classes - 1} allowed")
    found = labels[probabilities.argmax(1) == labels]
    return np.stack([np.bincount(x, minlength=classes) for x in (found, labels)])


class _Reservoir:
    """A uniform sample of at most `size` rows of a stream (Vitter's algorithm R)."""

    def __init__(self, size: int):
        self.size, self.seen, self._rows = size, 0, []

    def places(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Where each of the next `count` rows goes; -1 for those that are dropped."""
        index = self.seen + np.arange(count)
        drawn = rng.integers(0, index + 1)
        return np.where(index < self.size, index, np.where(drawn < self.size, drawn, -1))

    def put(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Stores the rows at their places."""
        self.seen += len(rows)
        for row, place in zip(rows, places):
            if place == len(self._rows):
                self._rows.append(row)
            elif place >= 0:
                self._rows[place] = row

    @property
    def rows(self) -> np.ndarray:
        """What is held, `[<= size, D]`."""
        return np.stack(self._rows)
