"""jdiff jobs: where the jobs of a work directory stand."""

import argparse
import json
import pathlib
import time

from jdiff.commands.options import whole

SUMMARY = "where the launched jobs of a work directory stand, and the end of the log"
DESCRIPTION = """\
Asks SLURM, Kubernetes, the TPU VM or this machine about every job that `jdiff launch` started for
a work directory, and shows the end of the newest one's log. --cancel ends those that wait or run;
they save first."""
EXAMPLES = """\
examples:
  jdiff jobs --workdir=runs/two
  jdiff jobs --workdir=gs://bucket/runs/adm --lines=100
  jdiff jobs --workdir=runs/two --cancel

exit codes: 0, or 1 if the newest job failed; scripts may wait on that."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="as it was given to `jdiff launch`"
    )
    parser.add_argument(
        "--lines", type=whole(0), default=15, metavar="N",
        help="of the log's end (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--cancel", action="store_true", help="end the jobs that wait or run")


def run(args: argparse.Namespace) -> int:
    """Shows a line a job, the run's step and the log."""
    from jdiff.commands.launch import _module
    from jdiff.errors import UserError
    from jdiff.launching import jobs

    found = jobs.find(args.workdir)
    stands = [_module(job.platform).standing(job) for job in found]
    if args.cancel:
        for job, stand in zip(found, stands):
            if stand.state in jobs.GOES_ON:
                print(_module(job.platform).cancel(job))
        return 0
    for job, stand in zip(found, stands):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.submitted))
        print(f"{stand.state:<10} {job.platform} {job.id} ({job.name}), {when}: {stand.detail}")
    if progress := _progress(pathlib.Path(args.workdir)):
        print(progress)
    newest = found[-1]
    print(f"log        {newest.log}")
    try:
        end = _module(newest.platform).tail(newest, args.lines) if args.lines else ""
    except UserError as error:
        end = f"(no log: {error})"
    if end:
        print(end)
    return 1 if stands[-1].state == "failed" else 0


def _progress(workdir: pathlib.Path) -> str:
    """How far the run is, by its metrics; nothing if they are not here."""
    from jdiff.launching.jobs import tail_of

    try:
        last = json.loads(tail_of(workdir / "metrics.jsonl", 1))
        config = json.loads((workdir / "config.json").read_text())
        return f"run        step {last['step']:,} of {config['train']['steps']:,}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
