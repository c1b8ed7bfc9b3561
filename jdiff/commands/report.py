"""jdiff report: one HTML page about a run."""

import argparse
import pathlib

from jdiff.commands.options import add_workdir, output

SUMMARY = "write report.html: one self-contained page about a run"
DESCRIPTION = """\
Writes one HTML page about a run: its figures, loss curves, speed, samples over training, metrics
between floor and ceiling, config, versions, and the commands that reproduce it. The page needs no
network and no other file. A run that is still training gets a report of what there is so far."""
EXAMPLES = """\
examples:
  jdiff report --workdir=runs/digits
  jdiff report --workdir=runs/digits --out=digits.html"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_workdir(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE.html",
        help="where to write it (default: report.html in the run directory)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it lies."""
    from jdiff import report

    out = output(args.out, "--out", ".html") if args.out else None
    print(f"report   {report.write(args.workdir, out)}")
    return 0
