"""The option --cond: further conditions of the images that are drawn, from an .npz file."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from jdiff.errors import UserError


def add_cond(group: Any) -> None:
    """--cond of a command that draws images."""
    group.add_argument(
        "--cond", type=_npz, metavar="FILE.npz",
        help="what the network is told beside the label, by its names in the data "
        "(config.data.conditions): arrays [N, ...], e.g. text and text_mask; image i gets row i "
        "modulo N",
    )  # fmt: skip


def given(path: pathlib.Path | None, runs: Sequence[Any], num: int) -> dict[str, Any] | None:
    """The conditions `[num, ...]` of the file, for one run or all stages of a cascade.

    Raises:
      UserError: no file for networks that are told something, or one for networks that are not; or
        arrays that do not fit.
    """
    from jdiff.data import conditions

    told = {f.name: f for run in runs
            for f in conditions.named(run.config.data.conditions, run.info)}  # fmt: skip
    if path is None and not told:
        return None
    if path is None:
        shape = lambda f: ", ".join(map(str, ("N", *f.shape)))
        wanted = ", ".join(f"{f.name} [{shape(f)}]" for f in told.values())
        raise UserError(f"the network is told {wanted}; give such arrays: --cond=FILE.npz.")
    if not told:
        raise UserError(
            f"--cond={path}: the network is told nothing beside the label "
            "(config.data.conditions is empty)."
        )
    return conditions.in_turn(conditions.read(path, tuple(told.values())), num)


def _npz(text: str) -> pathlib.Path:
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{text!r} given; the name must end in .npz")
    return pathlib.Path(text)
