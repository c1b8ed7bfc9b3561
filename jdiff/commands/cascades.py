"""What `jdiff sample` and `jdiff evaluate` do with a cascade, and with a stage by itself."""

import argparse
import pathlib
import time
from typing import Any

from jdiff.commands import conditions, stages
from jdiff.commands.options import output
from jdiff.errors import UserError


def opened(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """(the cascade of --workdir, the sampler options of each stage), by the options given."""
    from jdiff import cache, staged

    configs = staged.parts(staged.read(args.workdir))
    cache.enable(configs[-1].compile_cache, configs[-1].cache_dir)
    averages, chosen = stages.of_cascade(args, configs)
    found = staged.load_cascade(args.workdir, ema=averages, sampling=chosen, mesh=args.mesh)
    return found, chosen


def sample(args: argparse.Namespace, console: Any) -> int:
    """Draws with all stages; a picture of the last one's images, or of all stages side by side."""
    import numpy as np

    from jdiff import generate, pictures
    from jdiff.commands import sample as command
    from jdiff.parallel import hosts

    out = output(args.out or args.workdir / "samples.png", "--out", ".png")
    npz = output(args.npz, "--npz", ".npz") if args.npz else None
    whole, chosen = opened(args)
    classes = max(run.null.get("label", 0) for run in whole.runs)
    names = whole.runs[-1].info.label_names
    wanted = command.wanted_labels(args.labels, classes, names)
    cond = dict(conditions.given(args.cond, whole.runs, args.num, args.prompt) or {})
    if wanted:
        cond["label"] = generate.in_turn(wanted, args.num)
    made, seconds, compiling = _draw(args, whole, cond, console)
    if not hosts.line().first:
        return 0
    last, together = made[-1], 1
    cells = last[: command.SHOWN]
    if args.all_stages:
        together, shown = len(made), command.SHOWN // len(made)
        sized = [pictures.at_size(part[:shown], *last.shape[1:3]) for part in made]
        cells = np.stack(sized, axis=1).reshape(-1, *last.shape[1:])
    columns = args.columns or command.per_row(
        args.prompt or wanted, len(cells) // together, together
    )
    captions = command.captions(args, cond.get("label"), names, classes, len(cells), together)
    picture = pictures.grid(cells, columns=columns * together, captions=captions, group=together)
    pictures.save(out, picture)
    command.tell_speed(console, args.num, seconds, compiling)
    command.tell_picture(console, out, args.num, len(cells) // together)
    if npz:
        used = [generate.settings(run, own) for run, own in zip(whole.runs, chosen)]
        more = {f"stage{k}": part for k, part in enumerate(made[:-1])} if args.all_stages else {}
        command.write_npz(
            npz, last, cond.get("label"), args.seed,
            {"workdir": str(args.workdir), "stages": used}, **more,
        )  # fmt: skip
        command.tell(console, f"images   {npz}")
    return 0


def _draw(
    args: argparse.Namespace, whole: Any, cond: dict[str, Any], console: Any
) -> tuple[list[Any], float, float]:
    """(the images of each stage, seconds, of which compilation), with a bar for each stage."""
    import numpy as np
    from rich.progress import Progress

    from jdiff import generate
    from jdiff.commands.timing import compile_clock

    start, parts = time.monotonic(), []
    with compile_clock() as clock, Progress(console=console, transient=True) as bar:
        tasks = [
            bar.add_task(f"stage {k}: {made.name}", total=args.num)
            for k, made in enumerate(whole.cascade.stages)
        ]
        tell = lambda k, count: bar.update(tasks[k], advance=count)
        for part in generate.cascade_images(
            whole, num=args.num, cond=cond, seed=args.seed, batch=args.batch, tell=tell
        ):
            parts.append(part if args.all_stages else part[-1:])
    made = [np.concatenate(column) for column in zip(*parts)]
    return made, time.monotonic() - start, clock.seconds


def enlarge(
    args: argparse.Namespace, run: Any, chosen: dict[str, Any], out: pathlib.Path,
    npz: pathlib.Path | None, console: Any,
) -> int:  # fmt: skip
    """Held-out images made smaller and enlarged by a stage: input | sample | truth."""
    import numpy as np
    from rich.progress import Progress

    from jdiff import generate, pictures, real
    from jdiff.commands import sample as command
    from jdiff.commands.timing import compile_clock
    from jdiff.parallel import hosts

    for option in ("labels", "cond"):
        if getattr(args, option) is not None:
            raise UserError(
                f"--{option}: {args.workdir} enlarges held-out images, and is told what belongs to "
                "them; leave it out."
            )
    held_out = real.source(run, "held-out")
    num = min(args.num, len(held_out))
    upsample, usual = generate.upsampler(run, seed=args.seed, sampling=chosen)
    batch = min(num, args.batch or usual)
    start, parts = time.monotonic(), []
    with compile_clock() as clock, Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=num)
        rows = real.rows(run, real.first(held_out, num), batch=batch)
        for part in generate.enlarged(run, rows, upsample, batch):
            parts.append(part)
            bar.update(task, advance=len(part.sample))
    seconds = time.monotonic() - start
    if not hosts.line().first:
        return 0
    small, large, sample, truth = (np.concatenate(c) for c in list(zip(*parts))[:4])
    told = [part.row.get("label") for part in parts]
    given = None if told[0] is None else np.concatenate(told).astype(np.int32)
    shown = command.SHOWN // 3
    cells = np.stack([large[:shown], sample[:shown], truth[:shown]], axis=1)
    cells = cells.reshape(-1, *truth.shape[1:])
    columns = args.columns or command.per_row(None, len(cells) // 3, 3)
    names, classes = run.info.label_names, run.info.num_classes
    captions = command.captions(args, given, names, classes, len(cells), 3)
    picture = pictures.grid(cells, columns=3 * columns, captions=captions, group=3)
    pictures.save(out, picture)
    command.tell_speed(console, num, seconds, clock.seconds)
    few = f" (all that there are; --num={args.num} was asked for)" if num < args.num else ""
    command.tell(console, f"held-out images made smaller and enlarged: {num:,}{few}")
    command.tell_picture(console, out, num, len(cells) // 3, "input enlarged | sample | truth")
    if npz:
        settings = {"workdir": str(args.workdir), **generate.settings(run, chosen)}
        command.write_npz(npz, sample, given, args.seed, settings, small=small, truth=truth)
        command.tell(console, f"images   {npz}")
    return 0


def evaluate(args: argparse.Namespace, console: Any) -> int:
    """Measures every stage from true and from generated input."""
    from jdiff import assess_cascade

    whole, chosen = opened(args)
    figures = assess_cascade.assess_cascade(
        whole, num=args.num, seed=args.seed, batch=args.batch, sampling=chosen,
        features=args.features, metrics=args.metrics and named(args.metrics), console=console,
    )  # fmt: skip
    console.print(assess_cascade.table(figures))
    for what, name in (("figures", assess_cascade.FILE), ("pictures", assess_cascade.PICTURES)):
        line = f"{what:8} {args.workdir / name}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def named(text: str) -> list[str]:
    """The names of a list joined by commas."""
    return [part.strip() for part in text.split(",")]
