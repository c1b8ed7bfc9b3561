"""jdiff sample: draws images from a trained run."""

import argparse
import json
import os
import pathlib
import time
from typing import Any

from jdiff.commands import labels, options
from jdiff.commands.many import add_hosts, joined
from jdiff.commands.options import add_sampling, add_workdir, output, whole

SUMMARY = "draw images from a run, as a PNG grid and as .npz"
DESCRIPTION = """\
Draws images from the trained model of a run and writes them as one PNG picture, and on request as
an .npz file with the single images.

Labels are given out in turn: image i gets the label number i modulo the number of labels, so that
with as many columns as labels each column of the picture is one class."""
EXAMPLES = """\
examples:
  jdiff sample --workdir=runs/digits
  jdiff sample --workdir=runs/digits --labels=0-9 --num=100 --guidance_scale=2 --out=digits.png
  jdiff sample --workdir=runs/digits --labels=3,7 --solver=ddim --solver_args=eta=0.5 --steps=50
  jdiff sample --workdir=runs/digits --num=10000 --batch=500 --seed=1 --npz=digits.npz

the .npz file holds:
  images    uint8 [N, H, W, C]
  labels    int32 [N], -1 for a model without labels
  ids       int64 [N]; image i depends on (seed, ids[i], labels[i]) alone
  seed      the seed
  settings  JSON text: checkpoint, weights, solver, grid and guidance"""

# More than this, and the PNG shows only the first ones: a picture is for looking at.
_SHOWN = 400


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_workdir(parser)
    what = parser.add_argument_group("images")
    what.add_argument(
        "--labels", metavar="LIST",
        help="numbers, ranges and names of classes, e.g. 0,1,2 or 0-9 or cat,dog, or `all` "
        "(default: all)",
    )  # fmt: skip
    what.add_argument(
        "--num", type=whole(1), default=64, metavar="N", help="how many (default: %(default)s)"
    )
    what.add_argument(
        "--out", type=pathlib.Path, metavar="FILE.png",
        help=f"the picture, of the first {_SHOWN} images at most (default: samples.png in the run "
        "directory); a file that is there is replaced",
    )  # fmt: skip
    what.add_argument(
        "--npz", type=pathlib.Path, metavar="FILE.npz", help="the single images, see below"
    )
    what.add_argument(
        "--columns", type=whole(1), metavar="C",
        help="images in a row of the picture (default: the number of labels if it is 2 to 20, else "
        "the square root of N)",
    )  # fmt: skip
    what.add_argument("--captions", action="store_true", help="write each image's class below it")
    add_sampling(parser)
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Draws, writes, and says where the files are."""
    with joined(args) as console:
        return _run(args, console)


def _run(args: argparse.Namespace, console: Any) -> int:
    from jdiff import cache, generate, pictures, runs
    from jdiff.parallel import hosts

    config = runs.read_config(args.workdir)
    cache.enable(config.compile_cache, config.cache_dir)
    out = output(args.out or args.workdir / "samples.png", "--out", ".png")
    npz = output(args.npz, "--npz", ".npz") if args.npz else None
    chosen = options.choices(args, config)

    opened = runs.load_run(args.workdir, ema=args.ema, step=args.step, mesh=args.mesh)
    classes = opened.null.get("label", 0)
    wanted = None
    if classes:
        wanted = labels.parse(args.labels or "all", classes, opened.info.label_names)
    elif args.labels is not None:
        labels.parse(args.labels, classes)
    given = generate.in_turn(wanted, args.num) if wanted else None
    images, seconds, compiling = draw(
        opened, chosen, num=args.num, seed=args.seed, labels=given, batch=args.batch,
        console=console,
    )  # fmt: skip

    if not hosts.line().first:
        return 0
    columns = args.columns or (len(wanted) if wanted and 2 <= len(wanted) <= 20 else None)
    captions = None
    if args.captions and wanted:
        names = opened.info.label_names or [str(i) for i in range(classes)]
        captions = [names[label] for label in given[:_SHOWN]]
    picture = pictures.grid(images[:_SHOWN], columns=columns, captions=captions)
    pictures.save(out, picture)
    rate = args.num / max(seconds - compiling, 1e-9)
    _tell(console, f"{args.num:,} images in {seconds - compiling:.1f} s ({rate:,.0f} a second), "
                   f"after {compiling:.1f} s of compilation")  # fmt: skip
    rest = f", the first {_SHOWN} of {args.num:,}" if args.num > _SHOWN else ""
    _tell(console, f"picture  {out}{rest}")
    if npz:
        settings = {"workdir": str(args.workdir), **generate.settings(opened, chosen)}
        write_npz(npz, images, given, args.seed, settings)
        _tell(console, f"images   {npz}")
    return 0


def draw(
    opened: Any, chosen: dict[str, Any], *, num: int, seed: int, labels: Any, batch: int | None,
    console: Any,
) -> tuple[Any, float, float]:  # fmt: skip
    """(images uint8 `[N, H, W, C]`, seconds, of which compilation), with a progress bar."""
    import numpy as np
    from rich.progress import Progress

    from jdiff import generate
    from jdiff.commands.timing import compile_clock

    start = time.monotonic()
    parts = []
    drawing = generate.images(
        opened, num=num, labels=labels, seed=seed, batch=batch, sampling=chosen
    )
    with compile_clock() as clock, Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=num)
        for part in drawing:
            parts.append(part)
            bar.update(task, advance=len(part))
    return np.concatenate(parts), time.monotonic() - start, clock.seconds


def write_npz(
    path: pathlib.Path, images: Any, labels: Any | None, seed: int, settings: dict[str, Any]
) -> None:
    """Writes the file that EXAMPLES describes, whole or not at all."""
    import numpy as np

    labels = np.full(len(images), -1, np.int32) if labels is None else labels
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file, images=images, labels=labels, ids=np.arange(len(images)),
                seed=np.int64(seed), settings=json.dumps(settings),
            )  # fmt: skip
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _tell(console: Any, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
