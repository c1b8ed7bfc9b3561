"""jdiff report: one HTML page about a run, a cascade, or all points of a sweep."""

import argparse
import pathlib

from jdiff.commands import stages
from jdiff.commands.options import add_workdir, output
from jdiff.errors import UserError

SUMMARY = "write report.html: one self-contained page about a run, a sweep or a cascade"
DESCRIPTION = """\
Writes one HTML page about a run: its figures, loss curves, speed, samples over training, metrics
between floor and ceiling, config, versions, and the commands that reproduce it. The page needs no
network and no other file. A run that is still training gets a report of what there is so far.

Of a sweep's folder: one table and plots over all points, the best marked, with means and 95 %
t-intervals over seeds; and the same numbers as report.csv and report_seeds.csv beside the page.

Of a cascade's folder: the images of all stages side by side, generated and from true input, each
stage's figures from both with the gap between them, and its training."""
EXAMPLES = """\
examples:
  jdiff report --workdir=runs/digits
  jdiff report --workdir=runs/digits --out=digits.html
  jdiff report --workdir=runs/lr --metric=accuracy
  jdiff report --workdir=runs/cdm"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_workdir(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE.html",
        help="where to write it (default: report.html in the run directory)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", metavar="NAME",
        help="of a sweep: the figure that decides which point is the best, as in its table: loss, "
        "frechet, precision, accuracy, ... (default: frechet, or the first that there is)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it lies."""
    from jdiff import report

    out = output(args.out, "--out", ".html") if args.out else None
    if (args.workdir / "sweep.json").is_file():
        page, *tables = report.write_sweep(args.workdir, out, args.metric)
        print(f"report   {page}")
        print(f"tables   {', '.join(map(str, tables))}")
        return 0
    if args.metric is not None:
        raise UserError(f"--metric is for a sweep's folder; {args.workdir} is none.")
    write = report.write_cascade if stages.folder(args.workdir) else report.write
    print(f"report   {write(args.workdir, out)}")
    return 0
