"""jdiff sweep: trains every point that the sweep() of a config file yields."""

import argparse
import fnmatch
import pathlib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jdiff import exits
from jdiff.commands.options import whole

SUMMARY = "train every point of a config file's sweep(), here or as a SLURM array"
DESCRIPTION = """\
A config file may have, beside get_config(), a function sweep() that yields overrides: dicts like
{"optimizer.learning_rate": 1e-3, "seed": 1}. Every one is a point: a run directory of its own below
WORKDIR, trained as `jdiff train` does.

One point that fails never stops the others. Ctrl-C and SIGTERM have all of them save. The same
command resumes: finished points are skipped, failed and stopped ones are taken up again, and points
that sweep() has gained are added. `jdiff report --workdir=WORKDIR` compares them all.

Fields that are overridden here hold for all points: --config.train.steps=500."""
EXAMPLES = """\
examples:
  jdiff sweep --config=configs/digits.py --workdir=runs/lr --list
  jdiff sweep --config=configs/digits.py --workdir=runs/lr --parallel=2 --retries=1
  jdiff sweep --config=configs/digits.py --workdir=runs/lr --only='*_seed=0'
  jdiff sweep --config=configs/digits.py --workdir=runs/lr --executor=slurm --time=0:30:00 \\
      --partition=gpu --gpus=1 --parallel=16 --dry_run

WORKDIR then holds:
  sweep.json                the points and their states
  NN_FIELD=VALUE_.../       a run directory for each point, as `jdiff train` makes them
  points/, logs/            each point's config, and what its process printed
  attempts/, slurm/         which process or job is at work; what was submitted
  report.html, report.csv   after `jdiff report`"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:TEXT]",
        help="a Python file with get_config() and sweep(); with :TEXT, get_config(TEXT) is called",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, metavar="DIR",
        help="the sweep's folder: new, empty, or of an earlier sweep of this config",
    )  # fmt: skip
    which = parser.add_argument_group("points")
    which.add_argument(
        "--sweep", default="", metavar="NAME",
        help="take the points of sweep_NAME() instead of sweep()",
    )  # fmt: skip
    which.add_argument(
        "--only", metavar="GLOB", help="only the points with such names, e.g. '03_*' or '*_seed=0'"
    )
    which.add_argument(
        "--list", action="store_true", help="show the points and how they stand; start nothing"
    )
    which.add_argument(
        "--dry_run", action="store_true", help="print exactly what would be started or submitted"
    )
    which.add_argument(
        "--no-evaluate", action="store_true", help="only train; the report has no evaluation then"
    )
    how = parser.add_argument_group("execution")
    how.add_argument(
        "--executor", choices=("local", "slurm"), default="local", metavar="WHERE",
        help="`local`: processes on this machine; `slurm`: one array job (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--parallel", type=whole(1), metavar="N",
        help="points at a time (default: 1; with --gpus as many as the machine has GPUs for; of an "
        "array, as many as SLURM lets run)",
    )  # fmt: skip
    how.add_argument(
        "--retries", type=whole(0), default=0, metavar="N",
        help="start a point that failed again, up to N times; not after a mistake in the config or "
        "a loss that is not finite, which would come again (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--gpus", type=whole(1), metavar="K",
        help="GPUs of a point: here, processes are given K of them each; in SLURM, K on each node",
    )  # fmt: skip
    slurm = parser.add_argument_group("SLURM", "Options of sbatch for each point of the array.")
    slurm.add_argument(
        "--time", metavar="LIMIT",
        help="as 30, 4:00:00 or 2-00:00:00; a point that needs longer saves and is queued again",
    )  # fmt: skip
    slurm.add_argument("--partition", metavar="NAME", help="of the nodes")
    slurm.add_argument("--nodes", type=whole(1), default=1, metavar="N", help="(default: 1)")
    slurm.add_argument(
        "--tasks_per_node", type=whole(1), default=1, metavar="N",
        help="processes of a point on each node (default: 1)",
    )  # fmt: skip
    slurm.add_argument("--cpus_per_task", type=whole(1), metavar="N", help="cores")
    slurm.add_argument("--memory", metavar="SIZE", help="of a node, as 64G")
    slurm.add_argument("--account", metavar="NAME", help="to charge")
    slurm.add_argument("--qos", metavar="NAME", help="quality of service")
    slurm.add_argument("--constraint", metavar="LIST", help="features that nodes must have")
    slurm.add_argument(
        "--notice", type=whole(30), default=120, metavar="S",
        help="seconds before the limit at which a point is asked to save (default: %(default)s)",
    )  # fmt: skip
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="any other, as --sbatch=--exclusive or --sbatch=--mail-type=END; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Resolves the points, then lists, prints, runs or submits them."""
    import jax
    from rich.console import Console

    jax.config.update("jax_platforms", "cpu")  # nothing is computed here: devices are the points'
    from jdiff.launching import array, folder, points

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log has room for names
    workdir = args.workdir
    found = points.resolve(
        args.config, args.overrides, sweep=args.sweep, known=folder.known(workdir)
    )
    folder.check(workdir, found)
    names = folder.chosen([point.name for point in found], args.only)
    queue = array.queue()
    if args.list or args.dry_run:
        states = folder.look(folder.planned(workdir, args.config, found), queue)
        if args.list:
            _print_states(console, {name: states[name] for name in states if _shown(name, args)})
        else:
            _print_plan(args, [name for name in names if _to_do(states[name])])
        return exits.OK
    with folder.locked(workdir):
        sweep = folder.claim(
            workdir, args.config, found, evaluate=not args.no_evaluate, command=sys.argv[1:]
        )
        if args.executor == "slurm":
            return _submit(args, console, sweep, names, queue)
        return _run_here(args, console, sweep, names, queue)


def _run_here(
    args: argparse.Namespace, console: Any, sweep: Any, names: Sequence[str], queue: Any
) -> int:
    """Trains on this machine, with a live table, and says how it ended."""
    from jdiff.commands import live
    from jdiff.errors import UserError
    from jdiff.launching import folder, local

    away = [n for n, s in folder.look(sweep, queue).items() if s.where.startswith("job ")
            and s.state in ("queued", "running")]  # fmt: skip
    if busy := sorted(set(away) & set(names)):
        raise UserError(f"{busy[0]} is in SLURM's queue; `--executor=slurm`, or scancel it first.")
    slots = local.places(args.parallel, args.gpus)
    with live.table(console, sweep) as tell:
        stopped_by = local.run(sweep, names, slots=slots, retries=args.retries, tell=tell)
    states = folder.look(sweep, queue)
    _print_states(console, states)
    _tell(console, f"report   jdiff report --workdir={shlex.quote(str(sweep.folder))}")
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        print(f"stopped by {name}; the same command resumes.", file=sys.stderr)
        return exits.INTERRUPTED if stopped_by == signal.SIGINT else exits.REQUEUE
    left = [name for name in names if states[name].state != "finished"]
    if left:
        print(f"{len(left)} of {len(names)} points are not finished; the same command takes them "
              f"up again: {', '.join(left)}", file=sys.stderr)  # fmt: skip
        return exits.FAILED
    return exits.OK


def _submit(
    args: argparse.Namespace, console: Any, sweep: Any, names: Sequence[str], queue: Any
) -> int:
    """Submits what is neither finished nor in the queue."""
    from jdiff.launching import array, folder

    states = folder.look(sweep, queue)
    todo = [name for name in names if _to_do(states[name])]
    if not todo:
        _print_states(console, states)
        _tell(console, "nothing to submit: every point is finished, running or queued")
        return exits.OK
    jobs = array.submit(
        sweep.folder, _commands(args, todo), _options(args), title=_title(args),
        parallel=args.parallel, retries=args.retries,
    )  # fmt: skip
    folder.write(sweep, folder.look(sweep, array.queue()))
    for name, job in zip(todo, jobs):
        _tell(console, f"{job:>12}  {name}")
    _tell(console, f"submitted {len(jobs)} of {len(names)} points; --list shows how they stand")
    return exits.OK


def _print_plan(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Exactly what would be started, as text that can be pasted or handed to sbatch."""
    from jdiff.launching import array, local

    if args.executor == "local":
        slots = local.places(args.parallel, args.gpus)
        print(f"# {len(names)} processes, {len(slots)} at a time")
        for words in _commands(args, names).values():
            print(shlex.join(words))
        return
    print(f"# sbatch {args.workdir.absolute() / 'slurm'}/....sh, which would be:")
    print(array.script(args.workdir, len(names), _options(args), title=_title(args),
                       parallel=args.parallel))  # fmt: skip
    print("# and the tasks of the array would run:")
    for i, words in enumerate(_commands(args, names).values()):
        print(f"# {i}: {shlex.join(words)}")


def _commands(args: argparse.Namespace, names: Sequence[str]) -> dict[str, list[str]]:
    from jdiff.launching import attempts

    folder = args.workdir.absolute() if args.executor == "slurm" else args.workdir
    evaluate = not args.no_evaluate
    return {name: attempts.command(folder, name, evaluate=evaluate) for name in names}


def _options(args: argparse.Namespace) -> Any:
    from jdiff.launching.slurm import Options

    return Options(
        nodes=args.nodes, tasks_per_node=args.tasks_per_node, gpus_per_node=args.gpus,
        cpus_per_task=args.cpus_per_task, memory=args.memory, time=args.time,
        partition=args.partition, account=args.account, qos=args.qos, constraint=args.constraint,
        notice=args.notice, sbatch=tuple(args.sbatch),
    )  # fmt: skip


def _title(args: argparse.Namespace) -> str:
    return args.workdir.absolute().name


def _to_do(status: Any) -> bool:
    return status.state in ("waiting", "stopped", "failed")


def _shown(name: str, args: argparse.Namespace) -> bool:
    return args.only is None or fnmatch.fnmatchcase(name, args.only)


def _print_states(console: Any, states: Mapping[str, Any]) -> None:
    from jdiff.commands import live

    console.print(live.rows(states, width=console.width))
    _tell(console, live.summary(states))


def _tell(console: Any, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
