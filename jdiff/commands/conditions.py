"""What the network is told of the images that are drawn: --prompt, or --cond from an .npz file."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from jdiff.errors import UserError


def add_cond(group: Any) -> None:
    """--prompt and --cond of a command that draws images."""
    group.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="what to draw, for a network that is told texts: read by the text encoder that its "
        "data were encoded with; give it several times for several, image i gets prompt i modulo "
        "their number",
    )  # fmt: skip
    group.add_argument(
        "--cond", type=_npz, metavar="FILE.npz",
        help="what the network is told beside the label, by its names in the data "
        "(config.data.conditions): arrays [N, ...], e.g. text and text_mask; image i gets row i "
        "modulo N",
    )  # fmt: skip


def given(
    path: pathlib.Path | None, runs: Sequence[Any], num: int, prompts: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """The conditions `[num, ...]` of the file or the prompts, for one run or a cascade's stages.

    Raises:
      UserError: nothing for networks that are told something, or something for networks that are
        not; both; arrays that do not fit; or data that do not say what read their texts.
    """
    from jdiff.data import conditions

    told = {f.name: f for run in runs
            for f in conditions.named(run.config.data.conditions, run.info)}  # fmt: skip
    if path is None and not prompts and not told:
        return None
    if path is not None and prompts:
        raise UserError("--prompt and --cond both say what the network is told; give one of them.")
    if not told:
        raise UserError(
            f"{f'--prompt={prompts[0]!r}' if prompts else f'--cond={path}'}: the network is told "
            "nothing beside the label (config.data.conditions is empty)."
        )
    if prompts:
        from jdiff import captions

        info = next(run.info for run in runs if run.config.data.conditions)
        return conditions.in_turn(captions.conditions(info, tuple(told), prompts), num)
    if path is None:
        shape = lambda f: ", ".join(map(str, ("N", *f.shape)))
        wanted = ", ".join(f"{f.name} [{shape(f)}]" for f in told.values())
        encoded = any(run.info.encoded and run.info.encoded.text for run in runs)
        also = "--prompt=TEXT, or " if encoded else ""
        raise UserError(f"the network is told {wanted}; give {also}such arrays: --cond=FILE.npz.")
    return conditions.in_turn(conditions.read(path, tuple(told.values())), num)


def _npz(text: str) -> pathlib.Path:
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{text!r} given; the name must end in .npz")
    return pathlib.Path(text)
