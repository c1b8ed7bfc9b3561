"""jdiff sample: draws images from a trained run."""

import argparse
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from jdiff.commands import cascades, conditions, labels, options, stages
from jdiff.commands.many import add_hosts, joined
from jdiff.commands.options import add_sampling, add_workdir, output, whole
from jdiff.errors import UserError

SUMMARY = "draw images from a run or a cascade, as a PNG grid and as .npz"
DESCRIPTION = """\
Draws images from the trained model of a run and writes them as one PNG picture, and on request as
an .npz file with the single images.

Labels are given out in turn: image i gets the label number i modulo the number of labels, so that
with as many columns as labels each column of the picture is one class.

Of a cascade's folder, all stages draw, and the picture shows the images of the last one; with
--all_stages it shows what every stage makes, side by side. Of the run of a super-resolution stage,
held-out images are made smaller and enlarged by it: input enlarged | sample | truth."""
EXAMPLES = """\
examples:
  jdiff sample --workdir=runs/digits
  jdiff sample --workdir=runs/digits --labels=0-9 --num=100 --guidance_scale=2 --out=digits.png
  jdiff sample --workdir=runs/digits --labels=3,7 --solver=ddim --solver_args=eta=0.5 --steps=50
  jdiff sample --workdir=runs/digits --num=10000 --batch=500 --seed=1 --npz=digits.npz
  jdiff sample --workdir=runs/cdm --all_stages --steps=20 --stage=1 --steps=10 --aug_level=0.2
  jdiff sample --workdir=runs/cdm/stage1 --num=16
  jdiff sample --workdir=runs/emoji_t2i --prompt="noto emoji of a red fox" --guidance_scale=3

the .npz file holds:
  images    uint8 [N, H, W, C]
  labels    int32 [N], -1 for a model without labels
  ids       int64 [N]; image i depends on (seed, ids[i], labels[i]) alone
  seed      the seed
  settings  JSON text: checkpoint, weights, solver, grid and guidance (a cascade: of each stage)
  stage0, stage1, ...  with --all_stages: uint8 [N, h, w, C] of the stages before the last
  small, truth         of a super-resolution run: its input and the held-out images"""

#: Of more images than this the PNG shows only the first ones: a picture is for looking at.
SHOWN = 400


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
        help=f"the picture, of the first {SHOWN} images at most (default: samples.png in the run "
        "directory); a file that is there is replaced",
    )  # fmt: skip
    what.add_argument(
        "--npz", type=pathlib.Path, metavar="FILE.npz", help="the single images, see below"
    )
    what.add_argument(
        "--columns", type=whole(1), metavar="C",
        help="images in a row of the picture, each with what stands beside it (default: the number "
        "of labels or prompts if it is 2 to 20, else so that the picture is about square)",
    )  # fmt: skip
    what.add_argument(
        "--captions", action="store_true", help="write each image's class, or prompt, below it"
    )
    what.add_argument(
        "--all_stages", action="store_true",
        help="of a cascade: show every stage's images side by side, and write them to the .npz",
    )  # fmt: skip
    conditions.add_cond(what)
    add_sampling(parser)
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Draws, writes, and says where the files are."""
    with joined(args) as console:
        return _run(args, console)


def _run(args: argparse.Namespace, console: Any) -> int:
    from jdiff import cache, generate, pictures, runs
    from jdiff.parallel import hosts

    if stages.folder(args.workdir):
        return cascades.sample(args, console)
    config = runs.read_config(args.workdir)
    stages.of_run(args, config)
    if args.all_stages:
        raise UserError(f"--all_stages is for a cascade's folder; {args.workdir} is a run.")
    cache.enable(config.compile_cache, config.cache_dir)
    out = output(args.out or args.workdir / "samples.png", "--out", ".png")
    npz = output(args.npz, "--npz", ".npz") if args.npz else None
    chosen = options.choices(args, config)

    opened = runs.load_run(
        args.workdir, ema=args.ema, step=args.step, mesh=args.mesh, autoencoder=args.autoencoder
    )
    if opened.low_res is not None:
        return cascades.enlarge(args, opened, chosen, out, npz, console)
    classes, names = opened.null.get("label", 0), opened.info.label_names
    wanted = wanted_labels(args.labels, classes, names)
    given = generate.in_turn(wanted, args.num) if wanted else None
    images, seconds, compiling = draw(
        opened, chosen, num=args.num, seed=args.seed, labels=given, batch=args.batch,
        cond=conditions.given(args.cond, [opened], args.num, args.prompt), console=console,
    )  # fmt: skip

    if not hosts.line().first:
        return 0
    shown = images[:SHOWN]
    columns = args.columns or per_row(args.prompt or wanted, len(shown))
    captioned = captions(args, given, names, classes, len(shown))
    pictures.save(out, pictures.grid(shown, columns=columns, captions=captioned))
    tell_speed(console, args.num, seconds, compiling)
    tell_picture(console, out, args.num, len(shown))
    if npz:
        settings = {"workdir": str(args.workdir), **generate.settings(opened, chosen)}
        write_npz(npz, images, given, args.seed, settings)
        tell(console, f"images   {npz}")
    return 0


def wanted_labels(text: str | None, classes: int, names: Sequence[str]) -> list[int] | None:
    """What --labels means; None for a model without labels.

    Raises:
      UserError: labels that there are not, see `labels.parse`.
    """
    if classes:
        return labels.parse(text or "all", classes, names)
    return None if text is None else labels.parse(text, classes)


def per_row(wanted: Sequence[Any] | None, count: int, together: int = 1) -> int:
    """Columns of a picture of `count` images, or of so many groups of `together` cells."""
    if wanted and 2 <= len(wanted) <= 20 // together:
        return len(wanted)
    return max(1, math.ceil(math.sqrt(count / together)))


def captions(
    args: argparse.Namespace, given: Any, names: Sequence[str], classes: int, cells: int,
    together: int = 1,
) -> list[str] | None:  # fmt: skip
    """Below the last cell of each image's group its prompt, or its class, if --captions asks."""
    if not args.captions or (given is None and not args.prompt):
        return None
    names = names or [str(i) for i in range(classes)]
    said = lambda i: args.prompt[i % len(args.prompt)] if args.prompt else names[int(given[i])]
    return [said(i // together) if i % together == together - 1 else "" for i in range(cells)]


def draw(
    opened: Any, chosen: dict[str, Any], *, num: int, seed: int, labels: Any, batch: int | None,
    console: Any, cond: Any = None,
) -> tuple[Any, float, float]:  # fmt: skip
    """(images uint8 `[N, H, W, C]`, seconds, of which compilation), with a progress bar."""
    import numpy as np
    from rich.progress import Progress

    from jdiff import generate
    from jdiff.commands.timing import compile_clock

    start = time.monotonic()
    parts = []
    drawing = generate.images(
        opened, num=num, labels=labels, cond=cond, seed=seed, batch=batch, sampling=chosen
    )
    with compile_clock() as clock, Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=num)
        for part in drawing:
            parts.append(part)
            bar.update(task, advance=len(part))
    return np.concatenate(parts), time.monotonic() - start, clock.seconds


def write_npz(
    path: pathlib.Path, images: Any, labels: Any | None, seed: int, settings: dict[str, Any],
    **more: Any,
) -> None:  # fmt: skip
    """Writes the file that EXAMPLES describes, whole or not at all."""
    import numpy as np

    labels = np.full(len(images), -1, np.int32) if labels is None else labels
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file, images=images, labels=labels, ids=np.arange(len(images)),
                seed=np.int64(seed), settings=json.dumps(settings), **more,
            )  # fmt: skip
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tell(console: Any, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def tell_speed(console: Any, num: int, seconds: float, compiling: float) -> None:
    """How long drawing took."""
    rate = num / max(seconds - compiling, 1e-9)
    tell(console, f"{num:,} images in {seconds - compiling:.1f} s ({rate:,.0f} a second), after "
                  f"{compiling:.1f} s of compilation")  # fmt: skip


def tell_picture(console: Any, out: pathlib.Path, num: int, shown: int, what: str = "") -> None:
    """Where the picture is, and what it shows."""
    rest = f", the first {shown} of {num:,}" if num > shown else ""
    tell(console, f"picture  {out}{rest}{f' ({what})' if what else ''}")
