"""What guidance gains and costs in text-to-image: distance and retrieval by scale and interval.

    python experiments/emoji_guidance.py --run=runs/emoji_t2i --scorer=runs/emoji_clip   # resumable
    python experiments/emoji_guidance.py --quick    # digits and their exact denoiser, no training

Classifier-free guidance (Ho and Salimans 2022) trades distance to the data for agreement with the
text; limited to the middle of the noise levels (Kynkaanniemi et al. 2024) it is said to lose less.
A trained run of configs/emoji_t2i.py draws for the same held-out captions, from the same noise, at
every scale with every interval. Each set of samples is measured by its Frechet distance, by the
score of a contrastive run, and by how often the own caption is the nearest of all (recall at 1).
Measured cells are files in the run's directory: the same command goes on where it was cut off.

In the quick form the denoiser is exact, that of 1,437 digits with noise of deviation 0.3, the
distance is between pixels, and the scorer compares with the mean of each class.
"""

import argparse
import json
import pathlib
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jdiff import assess, denoisers, generate, real, runs, schedules
from jdiff.contrastive.matching import Matching
from jdiff.contrastive.scorer import Scorer
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.experiment import defaults
from jdiff.training.logs import replace_text
from jdiff.yardstick import Yardstick, told, yardstick

HERE = pathlib.Path(__file__).parents[1]
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
#: Where guidance acts, in logSNR: alpha^2 / sigma^2 = exp(logSNR), and -2 log(sigma) for EDM.
INTERVALS = {"everywhere": None, "(-4, 3)": (-4.0, 3.0), "(-2, 2)": (-2.0, 2.0)}
SHOWN = 8  # captions in the picture


class Subject(NamedTuple):
    """What is guided, and what its samples are measured with.

    Attributes:
      run: the model.
      cond: what it is told, `[num, ...]`: the same captions for every cell.
      captions: the texts of these.
      measure: of distances.
      match: of samples against captions; it has seen the real pictures.
      folder: of the measured cells.
    """

    run: Any
    cond: Mapping[str, np.ndarray]
    captions: list[str]
    measure: Yardstick
    match: Matching
    folder: pathlib.Path


class Cell(NamedTuple):
    """One set of samples."""

    scale: float
    interval: str  # of `INTERVALS`


class Figures(NamedTuple):
    """What a set of samples came to."""

    frechet: float
    score: float
    recall: float


def cells(scales: tuple[float, ...], intervals: tuple[str, ...]) -> list[Cell]:
    """Scale by scale; without guidance an interval makes no difference."""
    return [
        Cell(scale, interval)
        for scale in scales for interval in intervals
        if scale != 1.0 or interval == intervals[0]
    ]  # fmt: skip


def of_run(
    workdir: pathlib.Path, scorer: str | None, num: int, features: str | None, console: Console
) -> Subject:
    """A trained run on captioned pictures.

    Raises:
      UserError: it is told no texts, there is no scorer, or its pictures are not there.
    """
    run = runs.load_run(workdir)
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluation.scorer = scorer or config.evaluation.scorer
        config.evaluation.top = (1,)
    run = run._replace(config=config)
    if config.evaluation.scorer is None:
        raise UserError("--scorer: name the run directory of a contrastive run, or a CLIP folder.")
    features = features or config.evaluation.features
    with told(console) as tell:
        splits, (_, other) = real.splits(run), real.sides(run)
        match = assess.matched(run, splits[other], num, tell)
        measure = yardstick(
            run, num=num, features=features, metrics=("frechet",), seed=0, tell=tell, splits=splits
        )  # fmt: skip
        cond = real.all_conditions(run, splits[other], num)
        captions = real.captions(run, splits[other], num)
    return Subject(run, cond, captions, measure, match, workdir / "guidance" / features)


def of_digits(workdir: pathlib.Path, num: int) -> Subject:
    """The exact denoiser of the digits, and the means of their classes as the scorer."""
    train, test = (sources.source("digits", split) for split in ("train", "test"))
    every, held_out = train.gather(range(len(train))), test.gather(range(len(test)))
    images, labels = every["image"].astype(np.float32) / 127.5 - 1, every["label"]
    config, schedule = defaults(), schedules.edm()
    config.sampling.grid.steps = 8
    config.evaluation.reference = "train"
    denoise = denoisers.mixture(images, 0.3**2, schedule, labels=labels)
    run = runs.Run(workdir, config, denoise, {"label": 10}, schedule, train.info, 0, "exact")
    with told(None) as tell:
        measure = yardstick(
            run, num=num, features="pixels", metrics=("frechet",), seed=0, tell=tell,
            splits={"training": train, "held-out": test},
        )  # fmt: skip
    wanted = generate.in_turn(list(range(10)), num)
    captions = [f"the digit {k}" for k in wanted]
    match = Matching(nearest_mean(images, labels), captions)
    places = [np.flatnonzero(held_out["label"] == k) for k in range(10)]
    match.add_real(held_out["image"][[places[k][i // 10] for i, k in enumerate(wanted)]])
    return Subject(run, {"label": wanted}, captions, measure, match, workdir / "guidance")


def nearest_mean(images: np.ndarray, labels: np.ndarray) -> Scorer:
    """Digits `[N, H, W, C]` and "the digit 3" as what they have beyond the mean of all, of unit
    length: the scorer of classes."""
    centre = images.mean(axis=0)
    unit = lambda x: (
        (y := np.asarray(x - centre).reshape(len(x), -1)) / np.linalg.norm(y, axis=1, keepdims=True)
    )
    means = np.stack([images[labels == k].mean(axis=0) for k in range(10)])
    read = lambda texts: unit(means)[[int(text.rsplit(" ")[-1]) for text in texts]]
    return Scorer("the means of the classes", unit, read, batch=256)


def measured(subject: Subject, cell: Cell) -> tuple[Figures, np.ndarray]:
    """(figures, first images) of a cell: every cell is drawn from the same noise."""
    sampling = {"guidance": {"scale": cell.scale, "interval": INTERVALS[cell.interval]}}
    summarizer, match, first = subject.measure.summarizer(), subject.match.anew(), []
    num = len(subject.captions)
    for images in generate.images(
        subject.run, num=num, cond=subject.cond, seed=1, sampling=sampling
    ):
        summarizer.add(images)
        match.add(images)
        first.append(images[:SHOWN])
    distance = subject.measure.figures(summarizer.summary())["frechet"]["value"]
    rows = {row["key"]: row["value"] for row in match.rows()}
    found = Figures(float(distance), rows["clip_score"], rows["caption_recall_1"])
    return found, np.concatenate(first)[:SHOWN]


def limits(subject: Subject) -> dict[str, Figures]:
    """What real pictures of these captions come to, and what noise does, by chance."""
    match, shape = subject.match.anew(), subject.measure.reference[1].shape
    match.add(np.zeros((len(subject.captions), *shape), np.uint8))  # the real ones count here
    real_ones = {row["key"]: row["floor"] for row in match.rows()}
    figures = lambda summary: subject.measure.figures(summary)["frechet"]["value"]
    floor, ceiling = figures(subject.measure.floor[1]), figures(subject.measure.ceiling)
    return {
        "real pictures": Figures(floor, real_ones["clip_score"], real_ones["caption_recall_1"]),
        "noise, any caption": Figures(ceiling, float("nan"), 1 / len(set(subject.captions))),
    }


def kept(subject: Subject, cell: Cell) -> pathlib.Path:
    """The file of a measured cell; its first images lie beside it."""
    where = cell.interval.strip("()").replace(", ", "_")
    step, num = subject.run.step, len(subject.captions)
    return subject.folder / f"scale{cell.scale:g}_{where}_{num}_step{step}.json"


def measure(
    subject: Subject, todo: list[Cell], say: Callable[[str], None]
) -> dict[Cell, tuple[Figures, np.ndarray]]:
    """The figures and first images of all cells, of what is kept as it is."""
    found = {}
    subject.folder.mkdir(parents=True, exist_ok=True)
    for i, cell in enumerate(todo, 1):
        file = kept(subject, cell)
        if not file.exists():
            figures, images = measured(subject, cell)
            np.save(file.with_suffix(".npy"), images)
            replace_text(file, json.dumps(figures._asdict()) + "\n")
            say(
                f"[{i}/{len(todo)}] scale {cell.scale:g}, {cell.interval}: distance "
                f"{figures.frechet:.2f}, caption found {100 * figures.recall:.1f} %"
            )
        figures = Figures(**json.loads(file.read_text()))
        found[cell] = figures, np.load(file.with_suffix(".npy"))
    return found


def table(results: Mapping[Cell, Figures], ends: Mapping[str, Figures]) -> str:
    """Markdown: a row a cell, and of the limits below."""
    show = lambda f: [
        "" if np.isnan(v) else text.format(v)
        for v, text in zip(f, ("{:.2f}", "{:.1f}", "{:.1%}"))
    ]  # fmt: skip
    lines = ["| scale | guided | Frechet distance | score | caption found |", "|---" * 5 + "|"]
    for cell, figures in results.items():
        where = cell.interval if cell.scale != 1 else "nowhere"
        lines.append("| " + " | ".join([f"{cell.scale:g}", where, *show(figures)]) + " |")
    for name, figures in ends.items():
        lines.append("| " + " | ".join([name, "", *show(figures)]) + " |")
    return "\n".join(lines)


def picture(results: Mapping[Cell, tuple[Figures, np.ndarray]], ends: Mapping[str, Figures],
            captions: list[str], out: pathlib.Path) -> None:  # fmt: skip
    """Distance and retrieval against the scale, one against the other, and samples by scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jdiff import pictures

    shown = [cell for cell in results if cell.interval == next(iter(results)).interval]
    figure = plt.figure(figsize=(11, 4.5 + 1.25 * len(shown)))
    grid = figure.add_gridspec(2, 3, height_ratios=(3.2, 1.25 * len(shown)))
    axes = [figure.add_subplot(grid[0, i]) for i in range(3)]
    unguided = [cell for cell in results if cell.scale == 1]
    real_ones = ends["real pictures"]
    for interval, style in zip(dict.fromkeys(c.interval for c in results), ("o-", "s--", "^-")):
        mine = unguided + [c for c in results if c.interval == interval and c.scale != 1]
        scales = [c.scale for c in mine]
        rows = [results[c][0] for c in mine]
        axes[0].plot(scales, [r.frechet for r in rows], style, label=interval)
        axes[1].plot(scales, [100 * r.recall for r in rows], style)
        axes[2].plot([100 * r.recall for r in rows], [r.frechet for r in rows], style)
    axes[0].axhline(real_ones.frechet, color="0.5", linestyle=":", label="real pictures")
    axes[1].axhline(100 * real_ones.recall, color="0.5", linestyle=":")
    axes[2].plot(100 * real_ones.recall, real_ones.frechet, "*", color="0.5", markersize=11)
    axes[0].set(ylabel="Fréchet distance")
    axes[1].set(ylabel="caption found (%)")
    axes[2].set(xlabel="caption found (%)", ylabel="Fréchet distance")
    ticks = sorted({cell.scale for cell in results})
    for axis in axes[:2]:
        axis.set(xlabel="guidance scale", xscale="log", xticks=ticks)
        axis.set_xticklabels([f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axes[0].legend(title="guided at logSNR")
    below = figure.add_subplot(grid[1, :])
    images = np.concatenate([results[cell][1] for cell in shown])
    below.imshow(pictures.grid(images, columns=SHOWN), extent=(0, SHOWN, len(shown), 0))
    below.set_yticks(np.arange(len(shown)) + 0.5, [f"{cell.scale:g}" for cell in shown])
    told = [textwrap.fill(caption, 16) for caption in captions[:SHOWN]]
    below.set_xticks(np.arange(len(told)) + 0.5, told, fontsize=8)
    below.set(ylabel=f"guidance scale, {shown[0].interval}")
    below.tick_params(length=0)
    below.spines[:].set_visible(False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[Cell, Figures]:
    """Draws and measures what is missing, prints the table, writes the figure unless quick."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits, exact denoiser, two scales")
    parser.add_argument("--run", type=pathlib.Path, help="a run of configs/emoji_t2i.py")
    parser.add_argument("--scorer", help="a run of configs/emoji_clip.py, or a CLIP folder")
    parser.add_argument("--num", type=int, help="samples of each cell (500; quick: 100)")
    parser.add_argument("--features", help="of the distances (the run's own unless given)")
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/emoji_guidance_quick"),
        help="of the quick form's cells; others lie in the run's directory",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="the file of the figure")
    args = parser.parse_args(argv)
    if not args.quick and args.run is None:
        parser.error("--run=DIRECTORY names a trained run; or give --quick.")
    console = Console()
    if args.quick:
        subject = of_digits(args.workdir, args.num or 100)
        todo = cells((1.0, 4.0), ("everywhere", "(-2, 2)"))
    else:
        subject = of_run(args.run, args.scorer, args.num or 500, args.features, console)
        todo = cells(SCALES, tuple(INTERVALS))
    found = measure(subject, todo, console.print)
    ends, results = limits(subject), {cell: figures for cell, (figures, _) in found.items()}
    print("\n" + table(results, ends) + "\n", flush=True)
    out = args.out or (None if args.quick else HERE / "docs" / "images" / "emoji_guidance.png")
    if out is not None:
        picture(found, ends, subject.captions, out)
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
