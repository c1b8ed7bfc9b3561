"""The assessment of a cascade: every stage from true and from generated input.

From true input (real images made smaller) a stage is as good as it is alone; from what the stages
before it generate, as good as it is in the cascade. The gap between the two is the compounding
error, which augmentation of the input is to close (Ho et al. 2022, "Cascaded Diffusion Models").
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jdiff import assess, generate, pictures, real
from jdiff import yardstick as yardsticks
from jdiff.assess import FILE, Timer, enough
from jdiff.fidelity import Fidelity
from jdiff.parallel import hosts
from jdiff.training.logs import replace_text
from jdiff.yardstick import FIGURES, Yardstick, finite, plainly, told, wanted_metrics

#: The folder of pictures beside evaluation.json: generated_K.png, input_K.png, sample_K.png and
#: truth_K.png of stage K, the same images at the same places.
PICTURES = "pictures"
_COLUMNS = 4
_PIXELS = 16 * 256 * 256  # of all images of a picture
_FIGURES = FIGURES | {
    "inception_score": ("Class score", "higher", "Inception Score, of a classifier of real images"),
    "accuracy": ("Intended class found", "higher", "by a classifier of real images of this size"),
}


@dataclasses.dataclass
class _Stage:
    """What is collected of a stage."""

    measure: Yardstick
    generated: Any
    true: Any  # of the base, which has no input: None
    fidelity: Fidelity | None
    shots: dict[str, list[np.ndarray]]


def assess_cascade(
    opened: Any, *, num: int | None = None, seed: int = 0, batch: int | None = None,
    sampling: Sequence[Mapping[str, Any] | None] | None = None, features: str | None = None,
    metrics: Iterable[str] | None = None, console: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures all stages of a cascade; writes evaluation.json and pictures in its folder.

    The reference, the features and the number of images are those of the last stage's
    config.evaluation. True inputs are made of the split that samples are not compared with, so that
    no set shares an image with the reference; the generated images have the labels (and further
    conditions) of these, and are as many, as distances depend on the number. PSNR and SSIM are
    measured on held-out images, whichever the reference is. Before a truncated stage, the stage
    before is measured by what it makes when it does not stop.

    Args:
      opened: from `staged.load_cascade`.
      num: images at most; config.evaluation.num of the last stage unless given.
      seed: as in `assess.assess`; stage k draws as `cascade.sample` with the same seed does.
      batch: images at a time; the least of the stages' config.sampling.batch unless given.
      sampling: of each stage, what `load_cascade` was given; only for the record.
      features, metrics, console: as in `assess.assess`.

    Returns:
      {"settings", "seconds", "stages": [{"stage", "name", "shape", "settings", "metrics": [{"key",
      "name", "better", "about", "true", "generated", "gap", "floor", "ceiling"}, ...], "pairs":
      `Fidelity.result`, or None}, ...]}. The gap is generated - true; there is none of the base.

    Raises:
      UserError: as `assess.assess`.
    """
    started = time.monotonic()
    members, last = opened.runs, opened.runs[-1]
    num = enough(last.config.evaluation.num if num is None else num)
    features = last.config.evaluation.features if features is None else features
    wanted = [wanted_metrics(run, features, metrics) for run in members]
    sides = real.sides(last)
    with told(console) as tell, plainly():
        splits = _splits(members)
        others = splits[-1][sides[1]]
        num = enough(min(num, len(others)))
        stages = []
        for k, (run, made) in enumerate(zip(members, opened.cascade.stages)):
            measure = yardsticks.yardstick(
                run, num=num, features=features, metrics=wanted[k], seed=seed,
                tell=_within(tell, k), splits=splits[k], side=made.shape[0], sides=sides,
            )  # fmt: skip
            true, fidelity = None, None
            if k:
                true, fidelity = measure.summarizer(), Fidelity(run.low_res)
            stages.append(_Stage(measure, measure.summarizer(), true, fidelity, {}))
        clock = Timer()
        cond = real.all_conditions(last, real.part(others, num, seed), num)
        _generate(opened, stages, num, cond, seed, batch, clock, tell)
        for k in range(1, len(stages)):
            _restore(
                opened, k, stages[k], splits[k], num, seed, batch, sides[1], clock, _within(tell, k)
            )
        tell("figures")
        rows = [_rows(stage, run) for stage, run in zip(stages, members)]
    reference, floor = stages[-1].measure.reference, stages[-1].measure.floor
    result = {
        "settings": {
            "name": opened.config.name, "num": num, "seed": seed, "features": features,
            "reference": reference[0], "reference_images": reference[1].moments.count,
            "floor": floor[0], "floor_images": floor[1].moments.count,
        },
        "seconds": {
            "sampling": round(clock.seconds, 2), "total": round(time.monotonic() - started, 2),
        },
        "stages": [
            {
                "stage": k, "name": run.config.name, "shape": list(opened.cascade.stages[k].shape),
                "settings": generate.settings(run, dict(choices or {})),
                "metrics": rows[k],
                "pairs": stages[k].fidelity and stages[k].fidelity.result(),
            }
            for k, (run, choices) in enumerate(zip(members, sampling or [None] * len(members)))
        ],
    }  # fmt: skip
    if hosts.line().first:
        folder = last.workdir.parent
        _write_pictures(folder / PICTURES, stages)
        replace_text(folder / FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def table(result: dict[str, Any]) -> Any:
    """A rich renderable: each stage's figures from true and generated input, and to the truth."""
    from rich.console import Group
    from rich.text import Text

    from jdiff.report.figures import number, signed

    s = result["settings"]
    figures = _columns(
        "true\ninput", "generated\ninput", "gap", f"{s['floor']}\n(floor)", "noise\n(ceiling)"
    )  # fmt: skip
    truth = _columns("sample", "enlarged\ninput")
    named = lambda row: f"{row['name']} {'↓' if row['better'] == 'lower' else '↑'}"
    for stage in result["stages"]:
        size = " x ".join(map(str, stage["shape"][:2]))
        title = Text(f"stage {stage['stage']}, {size}", style="bold")
        figures.add_row(title)
        for row in stage["metrics"]:
            places = [number(row[place]) for place in ("true", "generated")]
            ends = [number(row[place]) for place in ("floor", "ceiling")]
            figures.add_row(named(row), *places, signed(row["gap"]), *ends)
        figures.add_section()
        if stage["pairs"]:
            truth.add_row(title)
            for row in stage["pairs"]["rows"]:
                truth.add_row(named(row), number(row["value"]), number(row["enlarged"]))
    caption = (
        f"{s['num']:,} images a set, against {s['reference_images']:,} {s['reference']} images; "
        f"features: {s['features']}; {result['seconds']['total']:.0f} s\n"
        "gap: generated - true input, the compounding error"
    )
    parts = [figures, *([truth] if truth.row_count else []), Text(caption, style="dim italic")]
    return Group(*parts)


def _columns(*titles: str) -> Any:
    """An empty rich table of figures by metric."""
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True
    )  # fmt: skip
    made.add_column("metric")
    for title in titles:
        made.add_column(title, justify="right", style="bold" if title == "gap" else None)
    return made


def _splits(members: Sequence[Any]) -> list[dict[str, Any]]:
    """`real.splits` of every stage, one and the same where the data are."""
    found: dict[tuple, dict[str, Any]] = {}
    made = []
    for run in members:
        c = run.config.data
        key = (c.name, c.train_split, c.test_split, c.data_dir, tuple(c.conditions))
        if key not in found:
            found[key] = real.splits(run)
        made.append(found[key])
    return made


def _generate(
    opened: Any, stages: list[_Stage], num: int, cond: dict[str, np.ndarray], seed: int,
    batch: int | None, clock: Timer, tell: real.Tell,
) -> None:  # fmt: skip
    """Draws with the cascade, and takes in what each stage makes."""
    from jdiff.cascades import Cascade

    made, labels, first = opened.cascade.stages, cond.get("label"), 0
    for end in range(len(made)):
        if end + 1 < len(made) and not made[end + 1].truncate:
            continue
        # A stage before a truncated one hands a noisy state on; its image is made apart.
        whole = opened._replace(cascade=Cascade(made[: end + 1]), runs=opened.runs[: end + 1])
        done = 0
        drawing = generate.cascade_images(whole, num=num, cond=cond, seed=seed, batch=batch)
        for images in clock.around(drawing):
            some = None if labels is None else labels[done : done + len(images[0])]
            for k in range(first, end + 1):
                stages[k].generated.add(images[k], some)
                _keep(stages[k], "generated", images[k], _shown(stages))
            done += len(images[0])
            tell("generated samples", done, num)
        first = end + 1


def _restore(
    opened: Any, k: int, stage: _Stage, splits: Any, num: int, seed: int, batch: int | None,
    other: str, clock: Timer, tell: real.Tell,
) -> None:  # fmt: skip
    """Gives stage k true input, and takes in what it makes of it."""
    run = opened.runs[k]
    upsample = generate.cascade_upsampler(opened.cascade, k, run, seed)
    made = assess.true_input(
        run, upsample, batch or run.config.sampling.batch, num=num, seed=seed, tell=tell,
        splits=splits, side=opened.cascade.stages[k].shape[0], other=other,
    )  # fmt: skip
    for side, some in clock.around(made):
        if side == other:
            stage.true.add(some.sample, some.row.get("label"))
        if side == "held-out":
            stage.fidelity.add(some)
            for name, images in (("input", some.large), ("sample", some.sample),
                                 ("truth", some.truth)):  # fmt: skip
                _keep(stage, name, images, _shown([stage]))


def _rows(stage: _Stage, run: Any) -> list[dict[str, Any]]:
    """The figures of a stage, a row each."""
    further = {} if stage.true is None else {"true": stage.true.summary()}
    figures = stage.measure.figures(stage.generated.summary(), **further)
    if "accuracy" in figures:
        figures["accuracy"]["ceiling"] = 1.0 / run.info.num_classes
    found = []
    for key, (name, better, about) in _FIGURES.items():
        if key not in figures:
            continue
        of = {place: finite(value) for place, value in figures[key].items()}
        true, generated = of.get("true"), of["value"]
        gap = None if None in (true, generated) else generated - true
        found.append({
            "key": key, "name": name, "better": better, "about": about, "true": true,
            "generated": generated, "gap": gap, "floor": of["floor"], "ceiling": of["ceiling"],
        })  # fmt: skip
    return found


def _shown(stages: list[_Stage]) -> int:
    """How many images a picture of the last of the stages has: whole rows."""
    height, width, _ = stages[-1].measure.reference[1].shape
    return _COLUMNS * max(1, min(4, _PIXELS // (height * width * _COLUMNS)))


def _keep(stage: _Stage, name: str, images: np.ndarray, most: int) -> None:
    kept = stage.shots.setdefault(name, [])
    missing = most - sum(map(len, kept))
    if missing > 0:
        kept.append(images[:missing])


def _write_pictures(folder: pathlib.Path, stages: list[_Stage]) -> None:
    folder.mkdir(exist_ok=True)
    for k, stage in enumerate(stages):
        for name, parts in stage.shots.items():
            picture = pictures.grid(np.concatenate(parts), columns=_COLUMNS)
            pictures.save(folder / f"{name}_{k}.png", picture)


def _within(tell: real.Tell, k: int) -> real.Tell:
    """Says which stage it is."""
    return lambda what, *more: tell(f"stage {k}: {what}", *more)
