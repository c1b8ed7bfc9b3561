"""The assessment of a run: its samples against real images, written to evaluation.json.

Every figure stands between two others that are measured in the same way: that of the training
split (as good as real images are; the floor of a distance) and that of noise (the ceiling).
"""

import json
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jdiff import generate, real, runs
from jdiff.errors import UserError
from jdiff.fidelity import Fidelity
from jdiff.parallel import hosts
from jdiff.training.logs import replace_text
from jdiff.yardstick import plainly, rows, told, wanted_metrics, yardstick

#: The file in the run directory.
FILE = "evaluation.json"


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

    A super-resolution run is given those real images, made smaller, and makes one sample of each;
    so neither its samples nor the floor share an image with the reference. How near samples are to
    the truth is measured on held-out images, whichever the reference is.

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

    With config.evaluation.scorer there are besides, whatever the metrics, those of
    `contrastive.matching`: how well samples match the captions that they were drawn for.

    Returns:
      {"settings", "seconds", "metrics": [{"key", "name", "better", "about", "value", "floor",
      "ceiling"}, ...], "classifier": None or {"accuracy", "test_accuracy", "chance", "per_class":
      [{"label", "name", "share", "num"}, ...]}}, and of a super-resolution run "pairs", see
      `Fidelity.result`.

    Raises:
      UserError: an unknown metric or feature, one that needs labels which the data do not have,
        fewer than 8 images, or weights that are not prepared (with the command that does it).
    """
    started = time.monotonic()
    num = enough(run.config.evaluation.num if num is None else num)
    features = run.config.evaluation.features if features is None else features
    wanted = wanted_metrics(run, features, metrics)
    runs.sampler(run, **(sampling or {}))  # its errors before the work
    with told(console) as tell, plainly():
        reference, other = real.sides(run)
        splits = real.splits(run)
        if run.low_res is not None:
            num = min(num, len(splits[other]))
        measure = yardstick(
            run, num=num, features=features, metrics=wanted, seed=seed, tell=tell, splits=splits
        )  # fmt: skip
        drawing, intended = Timer(), []
        summarizer = measure.summarizer()
        match = matched(run, splits[other], num, tell) if run.config.evaluation.scorer else None
        fidelity = None if run.low_res is None else Fidelity(run.low_res)

        def take(images: np.ndarray, labels: np.ndarray | None) -> None:
            summarizer.add(images, labels)
            intended.append(labels)
            if match is not None:
                match.add(images)

        if fidelity is None:
            made = _draw(run, splits[other], num, seed, batch, sampling, tell)
            for images, labels in drawing.around(made):
                take(images, labels)
        else:
            upsample, usual = generate.upsampler(run, seed=seed, sampling=sampling)
            made = true_input(
                run, upsample, batch or usual, num=num, seed=seed, tell=tell, splits=splits,
                other=other,
            )  # fmt: skip
            for side, some in drawing.around(made):
                if side == "held-out":
                    fidelity.add(some)
                if side == other:
                    take(some.sample, some.row.get("label"))
        figures = measure.figures(summarizer.summary())
        judged = _judged(run, figures, measure.judge, intended, splits["held-out"], tell)
    result = {
        "settings": {
            "num": num, "seed": seed, "features": features, **generate.settings(run, sampling),
            "reference": reference, "reference_images": measure.reference[1].moments.count,
            "floor": other, "floor_images": measure.floor[1].moments.count,
        },
        "seconds": {
            "classifier": round(measure.seconds, 2),
            "sampling": round(drawing.seconds, 2),
            "total": round(time.monotonic() - started, 2),
        },
        "metrics": rows(figures) + (match.rows(seed) if match else []),
        "classifier": judged,
    }  # fmt: skip
    if fidelity is not None:
        result["pairs"] = fidelity.result()
    if hosts.line().first:
        write(run.workdir, run.step, result)
    return result


def matched(run: runs.Run, source: Any, num: int, tell: real.Tell) -> Any:
    """The `contrastive.matching.Matching` of the samples that `num` images of a source are drawn
    for, which has seen these images themselves.

    Raises:
      UserError: a model that is told no texts, or a scorer that cannot be opened.
    """
    from jdiff.contrastive import matching, scorer

    c = run.config
    if run.low_res is not None or not c.data.conditions:
        raise UserError(
            f"config.evaluation.scorer={c.evaluation.scorer!r}: {run.workdir} does not draw images "
            "for texts (config.data.conditions); give None."
        )
    opened = scorer.load(c.evaluation.scorer)
    tell("captions")
    match = matching.Matching(
        opened, real.captions(run, source, num), pattern=c.evaluation.same, top=c.evaluation.top
    )
    for images, _ in real.images(run, real.part(source, num, 0), tell, "captioned images"):
        match.add_real(images)
    return match


def enough(num: int) -> int:
    """`num`, if an evaluation may have so few images.

    Raises:
      UserError: it may not.
    """
    if num < 8:
        raise UserError(f"num={num} images given; an evaluation needs at least 8.")
    return num


def true_input(
    run: runs.Run, upsample: generate.Upsample, batch: int, *, num: int, seed: int,
    tell: real.Tell, splits: Mapping[str, Any], other: str, side: int | None = None,
) -> Iterator[tuple[str, generate.Enlarged]]:  # fmt: skip
    """What a super-resolution run makes of real images: ("held-out" or "training", some of them).

    Of `num` held-out images, whose truth it has not seen; and, if samples are compared with the
    held-out split, of as many of the training split.

    Args:
      upsample, batch: as in `generate.enlarged`.
      num, seed: of `real.part`.
      splits: of `real.splits`.
      other: of `real.sides`.
      side: as in `real.rows`.
    """
    for name in dict.fromkeys(("held-out", other)):
        source, done = real.part(splits[name], num, seed), 0
        feed = real.rows(run, source, batch=batch, side=side)
        for some in generate.enlarged(run, feed, upsample, batch):
            done += len(some.sample)
            tell(f"samples of {name} images", done, len(source))
            yield name, some


def table(result: dict[str, Any]) -> Any:
    """A rich table of a result: each value beside its floor and ceiling."""
    from rich import box
    from rich.table import Table

    from jdiff.report.figures import number, percent

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, caption_justify="left")
    made.add_column("metric")
    s, judged = result["settings"], result["classifier"]
    what = s.get("what", "samples")
    made.add_column(what, justify="right", style="bold")
    made.add_column(f"{s['floor']} split\n(floor)", justify="right")
    made.add_column("noise\n(ceiling)", justify="right")
    made.add_column("better")
    for row in result["metrics"]:
        figures = [number(row[column]) for column in ("value", "floor", "ceiling")]
        made.add_row(row["name"], *figures, row["better"])
    for row in result.get("pairs", {}).get("rows", ()):
        enlarged = f"{number(row['enlarged'])} (enlarged)"
        made.add_row(row["name"], number(row["value"]), "", enlarged, row["better"])
    made.caption = (
        f"{s['num']:,} {what}, and {s['floor_images']:,} {s['floor']} images, against "
        f"{s['reference_images']:,} {s['reference']} images; features: {s['features']}; "
        f"{result['seconds']['total']:.0f} s"
    )
    if judged:
        shares = [judged[key] for key in ("accuracy", "test_accuracy", "chance")]
        made.add_row("Intended class found", *map(percent, shares), "higher")
        made.caption += "\nclass found: the floor is that of held-out images, the ceiling chance"
    if any(row["key"] == "clip_score" for row in result["metrics"]):
        made.caption += (
            f"\nCLIP score and captions: the floor is the {s['floor']} images whose captions these "
            "are, the ceiling shuffled captions"
        )
    return made


def _draw(
    run: runs.Run, others: Any, num: int, seed: int, batch: int | None, sampling: Any,
    tell: real.Tell,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:  # fmt: skip
    """Samples and their labels: each label as often; with further conditions, those of images."""
    told_of = real.told(run)
    cond: dict[str, np.ndarray] = {}
    if told_of == ["label"]:
        cond["label"] = generate.in_turn(list(range(run.info.num_classes)), num)
    elif told_of:
        cond = real.all_conditions(run, others, num)
    done, labels = 0, cond.get("label")
    tell("samples", done, num)
    for part in generate.images(run, num=num, cond=cond, seed=seed, batch=batch, sampling=sampling):
        given = None if labels is None else labels[done : done + len(part)]
        done += len(part)
        tell("samples", done, num)
        yield part, given


def _judged(
    run: runs.Run, figures: dict[str, Any], judge: Any, intended: list[np.ndarray], held_out: Any,
    tell: real.Tell,
) -> dict[str, Any] | None:  # fmt: skip
    """How often the classifier finds the intended class, in all and class by class."""
    if "accuracy" not in figures:
        return None
    classes = run.info.num_classes
    names = run.info.label_names or [str(k) for k in range(classes)]
    drawn = np.bincount(np.concatenate(intended), minlength=classes).tolist()
    shares = figures["accuracy_per_class"]["value"]
    images = real.images(run, held_out, tell, "held-out images")
    right = [judge.predict(x) == y for x, y in images]
    return {
        "accuracy": figures["accuracy"]["value"],
        "test_accuracy": float(np.concatenate(right).mean()),
        "chance": 1.0 / classes,
        "per_class": [
            {"label": k, "name": names[k], "share": shares[k], "num": drawn[k]}
            for k in range(classes) if drawn[k]
        ],
    }  # fmt: skip


def write(workdir: pathlib.Path, step: int, result: dict[str, Any]) -> None:
    """evaluation.json at once or not at all, and a line in metrics.jsonl."""
    replace_text(workdir / FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    line = {"step": step, "kind": "evaluation"}
    line |= {row["key"]: row["value"] for row in result["metrics"]}
    if result["classifier"]:
        line["accuracy"] = result["classifier"]["accuracy"]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Timer:
    """Seconds that were spent inside it, in all: a context, also around what yields."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Timer":
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds += time.monotonic() - self._start

    def around(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The same items; the time of who consumes them does not count."""
        while True:
            with self:
                item = next(iterator, self)
            if item is self:
                return
            yield item
