"""Conditioning augmentation in a cascade: how much noise on the low-resolution input helps.

    python experiments/cdm_conditioning_augmentation.py           # an hour on two cores; resumable
    python experiments/cdm_conditioning_augmentation.py --quick   # digits, one seed, minutes
    python experiments/cdm_conditioning_augmentation.py --report  # the tables of what is kept

The ablation of CDM (Ho et al. 2022, 2106.15282, 16 x 16 -> 64 x 64 ImageNet) on Fashion-MNIST, by
area means of its images. A cascade's second stage is trained on true small images and fed with
generated ones; noise on its input, at a level s that it is told, hides what is wrong with those.
Trained for every seed, for equally many steps: the base; a network of the full size alone ("no
cascade"); and second stages without augmentation, with Gaussian noise of s ~ U(0, T), and with
CDM's blur. Sampled: the cascade at each s, with noise added (non-truncated) or the base stopped
at s (truncated), and the second stage alone, fed with true held-out images, where noise can only
hurt. Every trained network is a run directory and every measured cell a file below --workdir: the
same command goes on where it was cut off.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jdiff import cascades, runs, train
from jdiff.data import batches, sources
from jdiff.errors import UserError
from jdiff.evaluation import classifier
from jdiff.evaluation.features import to_uint8
from jdiff.evaluation.metrics import class_score
from jdiff.evaluation.moments import Moments, frechet
from jdiff.experiment import defaults
from jdiff.generate import in_turn
from jdiff.training.logs import replace_text

#: What CDM reports by s: FID against the training set and the validation set, Inception Score.
PAPER = {
    "no cascade": (2.35, 2.91, 52.72), "s = 0": (6.02, 5.84, 35.59), "s = 101": (3.41, 3.67, 44.72),
    "s = 1001": (2.13, 2.79, 54.47),
}  # fmt: skip
MODELS = ("base", "single", "plain", "noise", "blur")


class Settings(NamedTuple):
    """What is trained and measured."""

    data: str = "fashion_mnist"
    size: int = 14  # pixels a side
    factor: int = 2  # by how much smaller the base is
    T: int = 4000  # steps of the discrete cosine schedule: the paper's unit of s
    levels: tuple[int, ...] = (101, 501, 1001)
    models: tuple[str, ...] = MODELS
    seeds: int = 3
    steps: int = 2000
    batch: int = 64
    channels: int = 16
    base_channels: int = 32
    num: int = 1000
    evaluations: int = 32  # of the denoiser a sample


QUICK = Settings(
    data="digits", size=8, levels=(101, 1001), models=("base", "single", "plain", "noise"), seeds=1,
    steps=400, base_channels=16, num=300, evaluations=16,
)  # fmt: skip


class Cell(NamedTuple):
    """One row of the results: what is drawn, and with which of the trained networks."""

    name: str
    model: str  # what draws the images of the full size
    level: float | None = None  # s, for the network that is told
    truncated: bool = False
    true: bool = False  # fed with true images instead of the base's


class Figures(NamedTuple):
    """Frechet distances to the training and the held-out split, and the class score."""

    train: float
    held_out: float
    score: float


#: Figures by the name of the cell, then by seed.
Results = dict[str, list[Figures]]


class Judge(NamedTuple):
    """What images are measured with."""

    classifier: classifier.Classifier
    train: Moments
    held_out: Moments
    images: np.ndarray  # held-out images uint8, as many of each class
    labels: np.ndarray  # theirs, in turn


def cells(s: Settings) -> list[Cell]:
    """All that is measured with the networks that are trained."""
    found = [Cell("no cascade", "single")]
    for true in (False, True):
        also = ", true input" if true else ""
        found.append(Cell(f"s = 0{also}", "plain", true=true))
        found += [
            Cell(f"s = {level}{' (amortised)' * (level == 0)}{also}", "noise", level, true=true)
            for level in (0, *s.levels)
        ]
        found.append(Cell(f"blur{also}", "blur", true=true))
    found += [Cell(f"s = {level}, truncated", "noise", level, True) for level in s.levels]
    return [cell for cell in found if cell.model in s.models]


def extent(s: Settings, model: str) -> tuple[int, int]:
    """(pixels a side, channels) of a network."""
    return (s.size // s.factor, s.base_channels) if model == "base" else (s.size, s.channels)


def config(s: Settings, model: str, seed: int) -> Any:
    """The experiment that trains one network."""
    c = defaults()
    size, channels = extent(s, model)
    c.seed, c.name = seed, f"conditioning augmentation: {model}, {s.data} at {size} x {size}"
    c.data.name, c.data.size, c.data.resample = s.data, size, "box"
    levels = 1 if size % 2 or size < 8 else 2 if size % 4 or size < 16 else 3
    c.model.update({
        "name": "unet", "channels": channels, "blocks": 1, "multipliers": (1, 2, 4)[:levels],
        "attention_sizes": (),
    })  # fmt: skip
    c.schedule.update({"name": "squared_cosine", "T": s.T})
    c.parameterization.target, c.parameterization.time = "v", "step"
    c.loss.distribution, c.loss.null_rate = (
        {"name": "uniform"},
        0.0,
    )  # nothing is guided, as in the paper
    c.optimizer.learning_rate, c.optimizer.schedule = 2e-3, "cosine"
    c.optimizer.warmup, c.optimizer.clip = min(100, s.steps // 4), 1.0
    c.ema = {"ema": {"kind": "constant", "decay": 0.995, "warmup": 0.05}}
    c.train.batch_size, c.train.steps = s.batch, s.steps
    c.train.sample_every, c.train.checkpoint_every, c.train.keep = s.steps, 500, 1
    c.sampling.solver = {"name": "ddpm"}
    c.sampling.grid = {"name": "trailing", "steps": s.evaluations}
    if model in ("plain", "noise", "blur"):
        c.low_res.factor = float(s.factor)
    if model == "noise":
        c.low_res.augmentation = {"name": "gaussian", "schedule": dict(c.schedule)}
        c.sampling.aug_level = float(s.levels[-1])
    if model == "blur":
        c.low_res.augmentation = {"name": "blur"}
    return c.lock()


def folder(workdir: pathlib.Path, model: str, seed: int) -> pathlib.Path:
    """Where a network is kept."""
    return workdir / f"{model}_{seed}"


def opened(workdir: pathlib.Path, model: str, seed: int, **choices: Any) -> cascades.Stage:
    """A trained network as a stage of a cascade; choices are of `cascades.stage`."""
    run = runs.load_run(folder(workdir, model, seed))
    denoise, solver, times = runs.sampler(run)
    return cascades.stage(
        denoise, times=times, shape=tuple(run.info.shape), solver=solver, low_res=run.low_res,
        **choices,
    )  # fmt: skip


def draw(s: Settings, workdir: pathlib.Path, cell: Cell, seed: int, judge: Judge) -> np.ndarray:
    """The cell's images `[num, size, size, C]`, uint8: every cell of a seed from the same key."""
    key, cond = jax.random.key(seed), {"label": jnp.asarray(judge.labels)}
    batch = min(s.num, 250)
    last = opened(workdir, cell.model, seed, level=cell.level, truncate=cell.truncated)
    base = [] if cell.model == "single" else [opened(workdir, "base", seed)]
    cascade = cascades.cascade(*base, last)
    if cell.true:
        small = last.low_res.shrink(judge.images.astype(np.float32) / 127.5 - 1)
        x = cascade.upsample(key, 1, small, cond, batch=batch)
    else:
        parts = cascade.stream(key, cond, s.num, batch=batch)
        x = np.concatenate([*track(parts, cell.name, -(-s.num // batch), transient=True)])
    return np.asarray(to_uint8(x))


def figures(images: np.ndarray, judge: Judge) -> Figures:
    """What uint8 images come to."""
    moments = Moments.of(judge.classifier.features(images))
    distances = [frechet(moments, other) for other in (judge.train, judge.held_out)]
    return Figures(*distances, class_score(judge.classifier.probabilities(images)))


def real(s: Settings, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images of the full size, labels) of a split."""
    feed = batches(sources.source(s.data, split), 1000, train=False, size=s.size, resample="box")
    images, labels = zip(*((part["image"], part["label"]) for part in feed))
    return np.concatenate(images), np.concatenate(labels)


def judged(s: Settings, workdir: pathlib.Path) -> Judge:
    """The classifier, trained on the training split and kept in workdir, and the real images."""
    (images, labels), (held_out, theirs) = real(s, "train"), real(s, "test")
    classes = int(labels.max()) + 1
    judge = classifier.train(images, labels, path=workdir / "classifier.safetensors")
    wanted = in_turn(list(range(classes)), s.num)
    places = [np.flatnonzero(theirs == k) for k in range(classes)]
    rows = [places[k][i // classes % len(places[k])] for i, k in enumerate(wanted)]
    moments = [Moments.of(judge.features(x)) for x in (images, held_out)]
    return Judge(judge, *moments, held_out[rows], wanted)


class Task(NamedTuple):
    """One thing to do: its name, about what it costs, whether it is done, and how it is done."""

    name: str
    weight: float
    done: Callable[[], bool]
    do: Callable[[], str]


def tasks(s: Settings, workdir: pathlib.Path, console: Any, judge: Callable[[], Judge]) -> list:
    """Seed after seed: the networks, then the cells."""

    def finished(model: str, seed: int) -> bool:
        return runs.read_description(folder(workdir, model, seed)).get("state") == "finished"

    def fit(model: str, seed: int) -> str:
        result = train.train(config(s, model, seed), folder(workdir, model, seed), console)
        return f"loss {result.loss:.4f}"

    def measure(cell: Cell, seed: int) -> str:
        file = kept(workdir, cell, seed)
        images = draw(s, workdir, cell, seed, judge())
        found = figures(images, judge())
        np.save(file.with_suffix(".npy"), images[:50])
        replace_text(file, json.dumps(found._asdict()) + "\n")
        return f"Frechet distance {found.train:.2f}"

    def cost(model: str) -> float:
        size, channels = extent(s, model)
        return float(size * channels) ** 2

    found = []
    for seed in range(s.seeds):
        for model in s.models:
            done, do = partial(finished, model, seed), partial(fit, model, seed)
            weight = 3 * s.steps * s.batch * cost(model)
            found.append(Task(f"seed {seed}, training {model}", weight, done, do))
        for cell in cells(s):
            done, do = kept(workdir, cell, seed).exists, partial(measure, cell, seed)
            weight = s.num * s.evaluations * cost(cell.model)
            found.append(Task(f"seed {seed}, {cell.name}", weight, done, do))
    return found


def kept(workdir: pathlib.Path, cell: Cell, seed: int) -> pathlib.Path:
    """The file of a measured cell; its first images lie beside it."""
    name = cell.name.replace(" = ", "").replace(", ", "_").replace(" ", "_")
    return workdir / "cells" / f"{name}_{seed}.json"


def work(todo: list[Task], say: Callable[[str], None]) -> None:
    """Does what is not done, and says how far it is and how long the rest will take."""
    left = [task for task in todo if not task.done()]
    if len(left) < len(todo):
        say(f"{len(todo) - len(left)} of {len(todo)} parts are there from before")
    began, spent, total = time.monotonic(), 0.0, sum(task.weight for task in left)
    for i, task in enumerate(left, 1):
        result = task.do()
        spent += task.weight
        minutes = (time.monotonic() - began) / 60
        rest = f"{minutes:.0f} min passed, about {minutes * (total - spent) / spent:.0f} min left"
        say(f"[{i}/{len(left)}] {task.name}: {result}; {rest}")


def claim(workdir: pathlib.Path, s: Settings) -> None:
    """Makes workdir the folder of these settings, for any number of seeds.

    Raises:
      UserError: it holds what was made with others.
    """
    known = {k: v for k, v in s._asdict().items() if k != "seeds"}
    file, text = workdir / "settings.json", json.dumps(known, indent=2) + "\n"
    if file.exists() and file.read_text() != text:
        raise UserError(f"{workdir} was made with other settings (settings.json); name another.")
    (workdir / "cells").mkdir(parents=True, exist_ok=True)
    replace_text(file, text)


def collect(s: Settings, workdir: pathlib.Path) -> Results:
    """What is on disk."""
    found: Results = {}
    for cell in cells(s):
        for file in (kept(workdir, cell, seed) for seed in range(s.seeds)):
            if file.exists():
                found.setdefault(cell.name, []).append(Figures(**json.loads(file.read_text())))
    return found


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and deviation (of a sample: n - 1; NaN for one value)."""
    values = np.asarray(list(values), float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else np.nan


def shown(rows: list[Figures] | None, field: str) -> str:
    """mean ± deviation of a figure, or nothing."""
    if not rows:
        return ""
    mean, deviation = spread(getattr(row, field) for row in rows)
    return f"{mean:.2f}" if np.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def against_paper(s: Settings, results: Results, held_out: Figures) -> str:
    """Markdown: the paper's rows and columns, with ours in front."""
    heads = "FD train | FD held-out | class score | CDM: FID train | CDM: FID validation | CDM: IS"
    lines = [f"| | {heads} |", "|---" * 7 + "|"]
    for name in ("no cascade", "s = 0", *(f"s = {level}" for level in s.levels), "blur"):
        if name in results:
            ours = [shown(results[name], field) for field in Figures._fields]
            theirs = [f"{v:.2f}" for v in PAPER[name]] if name in PAPER else [""] * 3
            lines.append("| " + " | ".join([name, *ours, *theirs]) + " |")
    ours = [f"{v:.2f}" for v in held_out]
    return "\n".join([*lines, "| " + " | ".join(["held-out images", *ours, "", "", ""]) + " |"])


def by_input(s: Settings, results: Results) -> str:
    """Markdown: FD to the training split by s, for generated and true input."""
    heads = "second stage | generated input | base stopped at s (truncated) | true input"
    lines = [f"| {heads} |", "|---" * 4 + "|"]
    names = ["s = 0", "s = 0 (amortised)", *(f"s = {level}" for level in s.levels), "blur"]
    for name in names:
        if name in results:
            row = [results.get(f"{name}{also}") for also in ("", ", truncated", ", true input")]
            lines.append(f"| {name} | " + " | ".join(shown(r, "train") for r in row) + " |")
    return "\n".join(lines)


def ordering(s: Settings, results: Results) -> dict[str, bool]:
    """Which of the paper's statements hold of our mean distances to the training split."""
    mean = {name: spread(row.train for row in rows)[0] for name, rows in results.items()}
    *weak, strong = (f"s = {level}" for level in s.levels)
    true = [f"{name}, true input" for name in ("s = 0 (amortised)", *weak, strong)]
    claims = {  # of each pair the first is to be below the second
        "without augmentation is the worst": [(n, "s = 0") for n in (*weak, strong, "no cascade")],
        "the strongest noise is the best": [(strong, n) for n in (*weak, "s = 0", "no cascade")],
        "on true input the distance rises with s": list(zip(true, true[1:])),
    }
    return {
        statement: all(mean[low] < mean[high] for low, high in pairs)
        for statement, pairs in claims.items()
        if {name for pair in pairs for name in pair} <= mean.keys()
    }


def picture(s: Settings, workdir: pathlib.Path, results: Results, out: pathlib.Path) -> None:
    """The distance against s, and images of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jdiff import pictures

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.2), width_ratios=(1, 1.15), layout="constrained"
    )
    places = (0, *s.levels)
    for label, also, style in (
        ("generated input", "", "o-"), ("truncated", ", truncated", "s--"),
        ("true input", ", true input", "^-"),
    ):  # fmt: skip
        points = [
            (i, *spread(row.train for row in results[name]))
            for i, level in enumerate(places)
            if (name := f"s = {level}{' (amortised)' * (level == 0)}{also}") in results
        ]
        if points:
            x, y, error = np.asarray(points).T
            left.errorbar(x, y, np.nan_to_num(error), fmt=style, capsize=3, label=label)
    lines = {"no cascade": "0.2", "s = 0": "#d62728", "blur": "#9467bd", "s = 0, true input": "0.6"}
    for name, colour in lines.items():
        if name in results:
            label = name.replace("s = 0", "no augmentation")
            height = spread(row.train for row in results[name])[0]
            left.axhline(height, color=colour, linestyle=":", label=label)
    left.set(xticks=range(len(places)), xlabel=f"s, of T = {s.T}", ylabel="Frechet distance")
    left.set_xticklabels(places)
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, ncols=2, loc="lower center")
    wanted = ("no cascade", "s = 0", f"s = {s.levels[-1]}", "blur")
    drawn = [c for c in cells(s) if c.name in wanted and kept(workdir, c, 0).exists()]
    blocks = [np.load(kept(workdir, cell, 0).with_suffix(".npy"))[:20] for cell in drawn]
    grids = [pictures.grid(block, columns=10, scale=4) for block in blocks]
    right.imshow(np.concatenate(grids))
    middles = [len(grids[0]) * (i + 0.5) for i in range(len(grids))]
    right.set_yticks(middles, [cell.name for cell in drawn])
    right.set_xticks([])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)
    plt.close(figure)


def report(s: Settings, workdir: pathlib.Path, judge: Judge, out: pathlib.Path | None) -> Results:
    """Prints the tables of what is on disk; writes results.json, and the figure to `out`."""
    results = collect(s, workdir)
    plain = {name: [row._asdict() for row in rows] for name, rows in results.items()}
    replace_text(workdir / "results.json", json.dumps(plain, indent=2) + "\n")
    print("\n" + against_paper(s, results, figures(judge.images, judge)))
    print("\n" + by_input(s, results) + "\n")
    for statement, holds in ordering(s, results).items():
        print(f"{statement}: {'yes' if holds else 'no'}")
    if out is not None and results:
        picture(s, workdir, results, out)
        print(f"\nwrote {out}")
    return results


def main(argv: list[str] | None = None, settings: Settings | None = None) -> Results:
    """Trains and measures what is missing, prints the tables, writes the figure unless quick."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits 4 -> 8, one seed, no figure")
    parser.add_argument("--report", action="store_true", help="only show what is there")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--workdir", type=pathlib.Path, help="where everything is kept")
    parser.add_argument("--out", type=pathlib.Path, help="where the figure goes")
    args = parser.parse_args(argv)
    s = settings or (QUICK if args.quick else Settings())
    s = s._replace(seeds=args.seeds or s.seeds, steps=args.steps or s.steps)
    here = pathlib.Path(__file__).resolve()
    workdir = args.workdir or pathlib.Path("runs", here.stem + "_quick" * args.quick)
    figure = here.parents[1] / "docs" / "images" / f"{here.stem}.png"
    out = args.out or (None if args.quick else figure)
    claim(workdir, s)
    judge = cache(lambda: judged(s, workdir))  # once there is something to measure
    if not args.report:
        work(tasks(s, workdir, Console(), judge), lambda line: print(line, flush=True))
    return report(s, workdir, judge(), out)


if __name__ == "__main__":
    main()
