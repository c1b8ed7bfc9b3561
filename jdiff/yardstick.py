"""What samples of a run are measured with: real images, noise, features and a classifier.

Every figure stands between two others that are measured in the same way: that of the other real
split (as good as real images are; the floor of a distance) and that of noise (the ceiling).
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jdiff import real, runs
from jdiff.errors import UserError, choose
from jdiff.parallel import hosts

#: The classifier of the real training split, kept in the run directory.
CLASSIFIER = "classifier.safetensors"
#: For each figure its name, which way is better, and what it is.
FIGURES = {
    "frechet": ("Fréchet distance", "lower", "between Gaussians fitted to the features"),
    "kernel": ("Kernel distance", "lower", "squared, unbiased, cubic kernel on the features"),
    "precision": ("Precision", "higher", "share of samples among the real images"),
    "recall": ("Recall", "higher", "share of real images among the samples"),
    "density": ("Density", "higher", "how densely the samples lie around real images"),
    "coverage": ("Coverage", "higher", "share of real images with a sample near by"),
    "inception_score": ("Class score", "higher", "Inception Score, of the classifier below"),
    "sliced": ("Sliced Wasserstein", "lower", "distance between pixels, over random directions"),
}
# Metrics for which a classifier of the real images is needed, whatever the features.
JUDGED = ("inception_score", "accuracy")
# Real images that the classifier is trained on at most.
_TAUGHT = 50_000


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """Figures of samples are taken by this.

    Attributes:
      metrics: names of `evaluation.METRICS`.
      features: the space of the distances.
      judge: the classifier of real images, or None.
      reference: (name, `Summary`) of the split that samples are compared with.
      floor: the same of the other split, as many images as there are samples, if there are.
      ceiling: `Summary` of as many images of noise.
      seed: of all that is random in measuring.
      seconds: that training the classifier took.
    """

    metrics: tuple[str, ...]
    features: Any
    judge: Any
    reference: tuple[str, Any]
    floor: tuple[str, Any]
    ceiling: Any
    seed: int
    seconds: float

    def summarizer(self) -> Any:
        """An empty `evaluation.Summarizer` for one set of samples."""
        from jdiff.evaluation.evaluate import Summarizer

        shape = self.reference[1].shape
        return Summarizer(self.features, _probabilities(self.judge), shape=shape, seed=self.seed)

    def figures(self, value: Any, **further: Any) -> dict[str, dict[str, float | None]]:
        """{metric: {"value", "floor", "ceiling", and the name of each further summary}}."""
        from jdiff.evaluation.evaluate import side_by_side

        floor, ceiling = self.floor[1], self.ceiling
        sets = {"value": value, "floor": floor, "ceiling": ceiling, **further}
        return side_by_side(sets, self.reference[1], self.metrics, seed=self.seed)


def yardstick(
    run: runs.Run, *, num: int, features: str, metrics: Iterable[str], seed: int, tell: real.Tell,
    splits: Mapping[str, Any], side: int | None = None, sides: tuple[str, str] | None = None,
) -> Yardstick:  # fmt: skip
    """Measures the real images of a run.

    Args:
      num: samples that there will be.
      features: "classifier", "pixels", "inception" or "resnet50".
      metrics: of `wanted_metrics`.
      seed: of the choice of real images, of the noise, and of what is random in measuring.
      tell: of the progress.
      splits: of `real.splits`.
      side: of the samples in pixels, as in `real.rows`.
      sides: as `real.sides` gives them, which it does unless given.

    Raises:
      UserError: weights of the features that are not prepared.
    """
    from jdiff.evaluation.evaluate import noise_batches, summarize

    extract = None if features == "classifier" else _extractor(features, run, side)
    reference, other = sides or real.sides(run)
    tell("real images")
    start, judge = time.monotonic(), None
    if features == "classifier" or set(metrics) & set(JUDGED):
        tell("training the classifier")
        judge = _classifier(run, splits["training"], seed, side)
    seconds = time.monotonic() - start
    space, probabilities = _divided(extract or judge.features), _probabilities(judge)
    images = lambda source, name: real.images(run, source, tell, f"{name} images", side=side)
    held = summarize(images(splits[reference], reference), space, probabilities, seed=seed)
    summary = lambda parts: summarize(parts, space, probabilities, shape=held.shape, seed=seed)
    floor = summary(images(real.part(splits[other], num, seed), other))
    ceiling = summary(noise_batches(held.shape, num, seed=seed))
    return Yardstick(
        tuple(metrics), space, judge, (reference, held), (other, floor), ceiling, seed, seconds
    )  # fmt: skip


def wanted_metrics(run: runs.Run, features: str, metrics: Iterable[str] | None) -> list[str]:
    """The metrics to measure, in the order of `evaluation.METRICS`; all that are possible for None.

    Raises:
      UserError: an unknown name, or one that needs labels which the data or the model do not have.
    """
    from jdiff.evaluation.evaluate import METRICS
    from jdiff.evaluation.features import NAMES

    choose("features", features, NAMES)
    labelled, conditional = bool(run.info.num_classes), "label" in run.null
    impossible = set(() if labelled else JUDGED) | set(() if conditional else ("accuracy",))
    if metrics is None:
        names = [n for n in METRICS if n not in impossible]
    else:
        given = [choose("metric", name, METRICS) for name in metrics]
        names = [n for n in METRICS if n in given]
    if not labelled and (features == "classifier" or impossible & set(names)):
        what = "features=classifier" if features == "classifier" else sorted(impossible)[0]
        raise UserError(f"{what}: {run.info.name} has no labels to train a classifier on.")
    if impossible & set(names):
        raise UserError("accuracy: the model was trained without labels, so it intends no class.")
    return names


def rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a figure, as evaluation.json has them, in the order of `FIGURES`."""
    found = []
    for key, (name, better, about) in FIGURES.items():
        if key in figures:
            row = {"key": key, "name": name, "better": better, "about": about}
            row |= {place: finite(value) for place, value in figures[key].items()}
            if f"{key}_deviation" in figures:
                row["deviation"] = finite(figures[f"{key}_deviation"]["value"])
            found.append(row)
    return found


def finite(value: float | None) -> float | None:
    """A float for JSON; None stands for what could not be measured."""
    return float(value) if value is not None and math.isfinite(value) else None


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What the images or features do not allow is a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"this cannot be evaluated: {error}") from error


@contextlib.contextmanager
def told(console: Any) -> Iterator[real.Tell]:
    """A progress bar that goes when it is over; yields tell(what, done, total)."""
    if console is None:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("[bold]evaluate"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str, done: int = 0, total: int | None = None) -> None:
            text = what if total is None else f"{what} {done:,}/{total:,}"
            bar.update(task, description=text, completed=done, total=total)

        yield tell


def _extractor(features: str, run: runs.Run, side: int | None) -> Any:
    from jdiff.evaluation.features import named

    shape = tuple(run.info.image_shape)
    shape = shape if side is None else (side, side, shape[-1])
    try:
        return named(features, shape)
    except FileNotFoundError as error:
        raise UserError(f"features={features}: {error}") from error


def _classifier(run: runs.Run, train: Any, seed: int, side: int | None) -> Any:
    from jdiff.evaluation import classifier

    whole = side not in (None, run.info.image_shape[0])  # and not patches, which training sees
    path = run.workdir / (f"classifier_{side}.safetensors" if whole else CLASSIFIER)
    parts = real.images(run, real.part(train, _TAUGHT, seed), lambda *_: None, side=side)
    images, labels = (np.concatenate(column) for column in zip(*parts))
    with hosts.first_before_others("classifier"):  # who reads what it has written
        return classifier.train(images, labels, num_classes=run.info.num_classes, path=path)


def _probabilities(judge: Any) -> Any:
    return judge and hosts.divided(judge.probabilities)


def _divided(extract: Any) -> Any:
    """The extractor, each process computing its part of every batch."""
    count = hosts.line().count
    if count == 1 or extract.name == "pixels":  # which are there already
        return extract
    return dataclasses.replace(
        extract, function=hosts.divided(extract), batch=extract.batch * count
    )
