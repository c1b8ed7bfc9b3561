"""Thresholding under guidance: how saturated samples become, and how far they end from the data.

    python experiments/imagen_thresholding.py                   # tables, docs/images/imagen_*.png
    python experiments/imagen_thresholding.py --quick           # few steps and samples, no figure
    python experiments/imagen_thresholding.py --data=digits     # one of the two sets alone

Imagen (Saharia et al. 2022, section 2.3) clips the predicted image at every step, by its range
(static) or by its own percentile, scaled back to the range (dynamic), and shows what it is for in
figures alone: without clipping strong guidance gives blank pictures, static clipping saturated
ones, and dynamic clipping neither. Here the network of configs/digits.py, trained on the digits
and on CIFAR-10 at 8 x 8 pixels, draws from the same noise with each at rising scales of guidance.
Digits have most of their pixels at the ends of the range to begin with; photographs, Imagen's case,
have few.
"""

import argparse
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from jdiff import runs, train
from jdiff.config import load
from jdiff.data import batches, sources
from jdiff.evaluation import classifier
from jdiff.evaluation.features import to_uint8
from jdiff.evaluation.moments import Moments, frechet
from jdiff.generate import in_turn
from jdiff.sampling import stream

HERE = pathlib.Path(__file__).parents[1]
CONFIG = HERE / "configs" / "digits.py"
KINDS = ("none", "static", "dynamic")
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
#: Ancestral sampling, as Imagen's.
SAMPLING = ('--config.sampling.solver={"name": "ddpm"}', "--config.sampling.grid.steps=24")
#: What is trained by data set: changes to the config. Area means, as CIFAR-10 has 32 x 32 pixels.
SETS = {
    "digits": (),
    "cifar10": (
        "--config.data.name=cifar10", "--config.data.size=8", "--config.data.resample=box",
        "--config.data.flip=true",
    ),
}  # fmt: skip


class Sizes(NamedTuple):
    """How much is trained and measured."""

    scales: tuple[float, ...] = SCALES
    steps: int | None = None  # of training; the config's if None
    num: int = 500


class Measured(NamedTuple):
    """What samples came to; the images are the first ones, uint8."""

    saturated: float
    magnitude: float
    frechet: float
    found: float
    images: np.ndarray


class Judge(NamedTuple):
    """What samples are measured with, and real images' own figures."""

    classifier: classifier.Classifier
    reference: Moments
    real: Measured  # held-out images, against the training split as samples are


def saturation(x: Any) -> tuple[float, float]:
    """Of images x in about [-1, 1]: the share of values that become 0 or 255, and the mean |x|."""
    levels = np.asarray(to_uint8(jnp.asarray(x)))
    return float(np.mean((levels == 0) | (levels == 255))), float(np.mean(np.abs(x)))


def measured(x: np.ndarray, labels: np.ndarray, judge: Any, reference: Moments) -> Measured:
    """Samples x `[N, H, W, C]` in about [-1, 1], drawn with these labels."""
    images = np.asarray(to_uint8(jnp.asarray(x)))
    distance = frechet(Moments.of(judge.features(images)), reference)
    found = float(np.mean(judge.predict(images) == labels))
    return Measured(*saturation(x), distance, found, images[:40])


def trained(name: str, sizes: Sizes, workdir: pathlib.Path, console: Console) -> runs.Run:
    """The run in `workdir`, trained (or resumed) unless it is there."""
    steps = () if sizes.steps is None else (f"--config.train.steps={sizes.steps}",)
    config = load(str(CONFIG), [*SAMPLING, *SETS[name], *steps])
    finished = runs.read_description(workdir).get("state") == "finished"
    if not finished or runs.read_config(workdir).train.steps != config.train.steps:
        train.train(config, workdir, console)
    return runs.load_run(workdir)


def real_images(run: runs.Run, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images, labels) of a split, as in training."""
    c = run.config.data
    source = sources.source(c.name, split, c.data_dir)
    feed = batches(source, 1000, train=False, size=c.size, resample=c.resample)
    parts = [(part["image"], part["label"]) for part in feed]
    images, labels = (np.concatenate(column) for column in zip(*parts))
    return images, labels


def judged(run: runs.Run) -> Judge:
    """A classifier of the training split, kept in the run's directory, and real images' figures."""
    images, labels = real_images(run, run.config.data.train_split)
    path = run.workdir / "classifier.safetensors"
    judge = classifier.train(images, labels, num_classes=run.info.num_classes, path=path)
    reference = Moments.of(judge.features(images))
    held_out, their_labels = real_images(run, run.config.data.test_split)
    real = measured(held_out / np.float32(127.5) - 1, their_labels, judge, reference)
    return Judge(judge, reference, real)


def draw(run: runs.Run, kind: str, scale: float, num: int, tell: Any) -> np.ndarray:
    """Samples `[num, H, W, C]` float32 of the classes in turn; the same noise every time."""
    denoise, solver, times = runs.sampler(
        run, guidance={"scale": scale}, threshold=None if kind == "none" else kind
    )
    labels = jnp.asarray(in_turn(list(range(run.info.num_classes)), num))
    parts = []
    for part in stream(
        jax.random.key(1), denoise, times=times, solver=solver, shape=tuple(run.info.shape),
        cond={"label": labels}, batch=min(num, 250),
    ):  # fmt: skip
        parts.append(np.asarray(part))
        tell(len(part))
    return np.concatenate(parts)


def kept(run: runs.Run, kind: str, scale: float, num: int) -> pathlib.Path:
    """Where a measured cell lies, in the run's directory."""
    return run.workdir / "measured" / f"{kind}_{scale:g}_{num}_step{run.step}.npz"


def measure(run: runs.Run, judge: Judge, sizes: Sizes, console: Console) -> dict:
    """{(kind, scale): Measured}, of what is kept as it is."""
    labels = in_turn(list(range(run.info.num_classes)), sizes.num)
    cells = [(kind, scale) for kind in KINDS for scale in sizes.scales]
    out = {}
    with Progress(
        TextColumn("[bold]sample"), BarColumn(), MofNCompleteColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(cells) * sizes.num)
        for kind, scale in cells:
            file = kept(run, kind, scale, sizes.num)
            if not file.exists():
                x = draw(run, kind, scale, sizes.num, partial(bar.advance, task))
                found = measured(x, labels, judge.classifier, judge.reference)
                console.print(f"{kind}, guidance {scale:g}: Frechet distance {found.frechet:.2f}")
                file.parent.mkdir(exist_ok=True)
                unfinished = file.with_name(f"unfinished_{file.name}")
                np.savez(unfinished, **found._asdict())
                unfinished.replace(file)
            bar.update(task, completed=(1 + cells.index((kind, scale))) * sizes.num)
            with np.load(file) as fields:
                numbers = [float(fields[name]) for name in Measured._fields[:-1]]
                out[kind, scale] = Measured(*numbers, fields["images"])
    return out


def table(name: str, results: dict, real: Measured) -> str:
    """Markdown: a row a scale, and in each column none / static / dynamic."""
    heads = ("saturated pixels", "mean magnitude", "Frechet distance", "class found")
    shown = (lambda v: f"{100 * v:.1f} %", "{:.2f}".format, "{:.2f}".format,
             lambda v: f"{100 * v:.0f} %")  # fmt: skip
    scales = list(dict.fromkeys(scale for _, scale in results))
    lines = ["| " + " | ".join([f"{name}: guidance", *heads]) + " |", "|---" * 5 + "|"]
    for scale in scales:
        cells = [
            " / ".join(show(results[kind, scale][i]) for kind in KINDS)
            for i, show in enumerate(shown)
        ]
        lines.append(f"| {scale:g} | " + " | ".join(cells) + " |")
    lines.append("| held-out images | " + " | ".join(f(v) for f, v in zip(shown, real)) + " |")
    return "\n".join(lines)


def picture(name: str, results: dict, real: Measured, out: pathlib.Path) -> None:
    """Curves against the scale, and samples of each kind at the strongest but one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from jdiff import pictures

    scales = list(dict.fromkeys(scale for _, scale in results))
    shown = scales[-2] if len(scales) > 1 else scales[0]
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 4.8), height_ratios=(1, 0.7))
    curves = {
        "share of saturated pixels": 0, "Frechet distance to the training split": 2,
        "share whose class is found": 3,
    }  # fmt: skip
    for axis, (title, field) in zip(axes[0], curves.items()):
        for kind, style in zip(KINDS, ("o-", "s--", "^-")):
            axis.plot(scales, [results[kind, s][field] for s in scales], style, label=kind)
        axis.axhline(real[field], color="0.5", linestyle=":", label="held-out images")
        axis.set(title=title, xlabel="guidance scale", xscale="log", xticks=scales)
        axis.set_xticklabels([f"{s:g}" for s in scales])
        axis.minorticks_off()
    axes[0, 1].set_yscale("log")
    axes[0, 0].legend()
    for axis, kind in zip(axes[1], KINDS):
        axis.imshow(pictures.grid(results[kind, shown].images, columns=10, scale=6))
        axis.set_title(f"{kind}, guidance {shown:g}")
        axis.axis("off")
    figure.suptitle(name)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Trains, prints a table a data set and, unless quick, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits, 400 steps, two scales")
    parser.add_argument("--data", choices=tuple(SETS), help="this set alone")
    parser.add_argument("--steps", type=int, help="of training (the config's unless given)")
    parser.add_argument("--num", type=int, help="samples for each figure (500)")
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/imagen_thresholding"),
        help="where what is trained is kept: the same command goes on from there",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="the folder of the figures")
    args = parser.parse_args(argv)
    sizes = Sizes((1.0, 8.0), 400, 200) if args.quick else Sizes()
    sizes = sizes._replace(steps=args.steps or sizes.steps, num=args.num or sizes.num)
    names = [args.data] if args.data else ["digits"] if args.quick else list(SETS)
    out = args.out or (None if args.quick else HERE / "docs" / "images")
    console, found = Console(), {}
    for name in names:
        folder = args.workdir / (f"{name}_quick" if args.quick else name)
        run = trained(name, sizes, folder, console)
        judge = judged(run)
        found[name] = measure(run, judge, sizes, console)
        print("\n" + table(name, found[name], judge.real) + "\n", flush=True)
        if out is not None:
            picture(name, found[name], judge.real, out / f"imagen_thresholding_{name}.png")
    print("In each cell: none / static / dynamic thresholding.")
    return found


if __name__ == "__main__":
    main()
