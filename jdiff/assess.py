"""The assessment of a run: its samples against real images, written to evaluation.json.

Every figure stands between two others that are measured in the same way: that of the training
split (as good as real images are; the floor of a distance) and that of noise (the ceiling).
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jdiff import generate, runs
from jdiff.errors import UserError, choose
from jdiff.parallel import hosts
from jdiff.training.logs import replace_text

#: The file in the run directory.
FILE = "evaluation.json"
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
_JUDGED = ("inception_score", "accuracy")
# Real images that the classifier is trained on at most.
_TAUGHT = 50_000
_BATCH = 256

Batches = Iterator[tuple[np.ndarray, np.ndarray | None]]


def assess(
    run: runs.Run, *, num: int | None = None, seed: int = 0, batch: int | None = None,
    sampling: dict[str, Any] | None = None, features: str | None = None,
    metrics: Iterable[str] | None = None, console: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures a run and writes evaluation.json; returns what it holds.

    Of many processes each computes the features of a part of the images; the first writes.

    Samples are drawn with the labels in turn, so that the classes are balanced. They, as many real
    images (all, if there are fewer), and as many of noise are compared with the reference: the
    held-out split, the real images then being of the training split, or the other way round
    (config.evaluation.reference). The classifier is trained once, on the training split.

    Args:
      run: from `runs.load_run`.
      num: images to draw; config.evaluation.num unless given.
      seed: of the samples, of the choice of real images, and of the noise.
      batch: images drawn at a time; config.sampling.batch unless given.
      sampling: replaces entries of config.sampling, see `runs.sampler`.
      features: "classifier", "pixels", "inception" or "resnet50"; config.evaluation.features unless
        given.
      metrics: some of `evaluation.METRICS`; all that the data allow unless given.
      console: a rich Console for a progress bar, or None.

    Returns:
      {"settings", "seconds", "metrics": [{"key", "name", "better", "about", "value", "floor",
      "ceiling"}, ...], "classifier": None or {"accuracy", "test_accuracy", "chance", "per_class":
      [{"label", "name", "share", "num"}, ...]}}.

    Raises:
      UserError: an unknown metric or feature, one that needs labels which the data do not have,
        fewer than 8 images, or weights that are not prepared (with the command that does it).
    """
    from jdiff.evaluation.evaluate import evaluate

    started = time.monotonic()
    num = run.config.evaluation.num if num is None else num
    if num < 8:
        raise UserError(f"num={num} images given; an evaluation needs at least 8.")
    features = run.config.evaluation.features if features is None else features
    wanted = wanted_metrics(run, features, metrics)
    runs.sampler(run, **(sampling or {}))  # its errors before the work
    extract = None if features == "classifier" else _extractor(features, run)
    with _told(console) as tell:
        tell("real images")
        train, test = (_source(run, split) for split in ("train_split", "test_split"))
        clock = time.monotonic()
        judge = None
        if features == "classifier" or set(wanted) & set(_JUDGED):
            tell("training the classifier")
            judge = _classifier(run, train, seed)
        seconds = {"classifier": time.monotonic() - clock}
        drawing = _Timer()
        reference, other = _sides(run)
        real = {"held-out": test, "training": train}
        floor = _part(real[other], num, seed)
        try:
            compared = evaluate(
                drawing.around(_draw(run, num, seed, batch, sampling, tell)),
                _batches(run, real[reference], tell, f"{reference} images"),
                features=_divided(extract or judge.features), metrics=wanted, seed=seed,
                probabilities=judge and hosts.divided(judge.probabilities),
                training=_batches(run, floor, tell, f"{other} images"),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"this cannot be evaluated: {error}") from error
        judged = _judged(run, compared["metrics"], judge, test, num, tell)
    seconds["sampling"] = drawing.seconds
    seconds["total"] = time.monotonic() - started
    result = {
        "settings": {
            "num": num, "seed": seed, "features": features, **generate.settings(run, sampling),
            "reference": reference, "reference_images": compared["num_reference"],
            "floor": other, "floor_images": len(floor),
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "metrics": _rows(compared["metrics"]),
        "classifier": judged,
    }  # fmt: skip
    if hosts.line().first:
        _write(run, result)
    return result


def wanted_metrics(run: runs.Run, features: str, metrics: Iterable[str] | None) -> list[str]:
    """The metrics to measure, in the order of `evaluation.METRICS`; all that are possible for None.

    Raises:
      UserError: an unknown name, or one that needs labels which the data or the model do not have.
    """
    from jdiff.evaluation.evaluate import METRICS
    from jdiff.evaluation.features import NAMES

    choose("features", features, NAMES)
    labelled, conditional = bool(run.info.num_classes), "label" in run.null
    impossible = set(() if labelled else _JUDGED) | set(() if conditional else ("accuracy",))
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


def table(result: dict[str, Any]) -> Any:
    """A rich table of a result: each value beside its floor and ceiling."""
    from rich import box
    from rich.table import Table

    from jdiff.report.figures import number, percent

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, caption_justify="left")
    made.add_column("metric")
    made.add_column("samples", justify="right", style="bold")
    s, judged = result["settings"], result["classifier"]
    made.add_column(f"{s['floor']} split\n(floor)", justify="right")
    made.add_column("noise\n(ceiling)", justify="right")
    made.add_column("better")
    for row in result["metrics"]:
        figures = [number(row[column]) for column in ("value", "floor", "ceiling")]
        made.add_row(row["name"], *figures, row["better"])
    made.caption = (
        f"{s['num']:,} samples, and {s['floor_images']:,} {s['floor']} images, against "
        f"{s['reference_images']:,} {s['reference']} images; features: {s['features']}; "
        f"{result['seconds']['total']:.0f} s"
    )
    if judged:
        shares = [judged[key] for key in ("accuracy", "test_accuracy", "chance")]
        made.add_row("Intended class found", *map(percent, shares), "higher")
        made.caption += "\nclass found: the floor is that of held-out images, the ceiling chance"
    return made


def _sides(run: runs.Run) -> tuple[str, str]:
    """(what samples are compared with, the other real split, whose distance is the floor)."""
    table = {"test": ("held-out", "training"), "train": ("training", "held-out")}
    return table[choose("config.evaluation.reference", run.config.evaluation.reference, table)]


def _extractor(features: str, run: runs.Run) -> Any:
    from jdiff.evaluation.features import named

    try:
        return named(features, tuple(run.info.shape))
    except FileNotFoundError as error:
        raise UserError(f"features={features}: {error}") from error


def _source(run: runs.Run, split: str) -> Any:
    from jdiff.data import sources

    c = run.config.data
    return sources.source(c.name, c[split], c.data_dir)


def _batches(run: runs.Run, source: Any, tell: Callable, what: str = "") -> Batches:
    """(images, labels) of real images, prepared as in training, in order and not mirrored."""
    from jdiff.data import batches

    c = run.config.data
    crop = "center" if c.crop == "random" else c.crop
    feed = batches(
        source, _BATCH, train=False, crop=crop, size=c.size, shard_index=0, shard_count=1
    )
    done = 0
    for part in feed:
        tell(what, done, len(source))
        done += len(part["image"])
        yield part["image"], part.get("label")


def _draw(
    run: runs.Run, num: int, seed: int, batch: int | None, sampling: Any, tell: Callable
) -> Batches:
    labels = generate.in_turn(list(range(run.info.num_classes)), num) if run.null else None
    done = 0
    tell("samples", done, num)
    for part in generate.images(
        run, num=num, labels=labels, seed=seed, batch=batch, sampling=sampling
    ):
        given = None if labels is None else labels[done : done + len(part)]
        done += len(part)
        tell("samples", done, num)
        yield part, given


def _classifier(run: runs.Run, train: Any, seed: int) -> Any:
    from jdiff.evaluation import classifier

    path = run.workdir / CLASSIFIER
    parts = list(_batches(run, _part(train, _TAUGHT, seed), lambda *_: None))
    images, labels = (np.concatenate(column) for column in zip(*parts))
    with hosts.first_before_others("classifier"):  # who reads what it has written
        return classifier.train(images, labels, num_classes=run.info.num_classes, path=path)


def _divided(extract: Any) -> Any:
    """The extractor, each process computing its part of every batch."""
    count = hosts.line().count
    if count == 1 or extract.name == "pixels":  # which are there already
        return extract
    return dataclasses.replace(
        extract, function=hosts.divided(extract), batch=extract.batch * count
    )


def _judged(
    run: runs.Run, figures: dict[str, Any], judge: Any, test: Any, num: int, tell: Callable
) -> dict[str, Any] | None:
    """How often the classifier finds the intended class, in all and class by class."""
    if "accuracy" not in figures:
        return None
    classes = run.info.num_classes
    names = run.info.label_names or [str(k) for k in range(classes)]
    drawn = np.bincount(generate.in_turn(list(range(classes)), num), minlength=classes).tolist()
    shares = figures["accuracy_per_class"]["value"]
    right = [judge.predict(x) == y for x, y in _batches(run, test, tell, "held-out images")]
    return {
        "accuracy": figures["accuracy"]["value"],
        "test_accuracy": float(np.concatenate(right).mean()),
        "chance": 1.0 / classes,
        "per_class": [
            {"label": k, "name": names[k], "share": shares[k], "num": drawn[k]}
            for k in range(classes) if drawn[k]
        ],
    }  # fmt: skip


def _rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, (name, better, about) in FIGURES.items():
        if key in figures:
            row = {"key": key, "name": name, "better": better, "about": about}
            row |= {place: _finite(figures[key][place]) for place in ("value", "floor", "ceiling")}
            if f"{key}_deviation" in figures:
                row["deviation"] = _finite(figures[f"{key}_deviation"]["value"])
            rows.append(row)
    return rows


def _write(run: runs.Run, result: dict[str, Any]) -> None:
    """evaluation.json at once or not at all, and a line in metrics.jsonl."""
    replace_text(run.workdir / FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    line = {"step": run.step, "kind": "evaluation"}
    line |= {row["key"]: row["value"] for row in result["metrics"]}
    if result["classifier"]:
        line["accuracy"] = result["classifier"]["accuracy"]
    with (run.workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _finite(value: float | None) -> float | None:
    """A float for JSON; None stands for what could not be measured."""
    return float(value) if value is not None and math.isfinite(value) else None


def _part(source: Any, num: int, seed: int) -> Any:
    """`num` examples of a source chosen at random, or all: distances depend on the number."""
    if len(source) <= num:
        return source
    picked = np.random.default_rng(seed).choice(len(source), num, replace=False)
    return _Part(source, np.sort(picked))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some examples of a source, as a source."""

    source: Any
    rows: np.ndarray

    @property
    def info(self) -> Any:
        return dataclasses.replace(self.source.info, size=len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.rows[index])]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        return self.source.__getitems__([int(self.rows[i]) for i in indices])

    def gather(self, indices: Iterable[int]) -> dict[str, Any]:
        return self.source.gather([int(self.rows[i]) for i in indices])


class _Timer:
    """The seconds that an iterator takes, without those of who consumes it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.monotonic()
            item = next(iterator, self)
            self.seconds += time.monotonic() - start
            if item is self:
                return
            yield item


@contextlib.contextmanager
def _told(console: Any) -> Iterator[Callable[..., None]]:
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
