"""What a kind of experiment says on the page of a run; the rest is the same for all of them."""

from collections.abc import Sequence
from typing import NamedTuple


class Words(NamedTuple):
    """The words of one run's page.

    Attributes:
      parts: of the line below the title, before the data; empty ones are left out.
      same: what the pictures of training show, and have in common.
      python: lines that open the run.
      commands: (label, name) of the commands besides train and evaluate that take --workdir.
      shown: what the pictures and the measured images are called.
      curves: (name, title, note) of numbers of metrics.jsonl that this kind logs besides.
    """

    parts: Sequence[str | None]
    same: str
    python: str
    commands: Sequence[tuple[str, str]] = ()
    shown: str = "samples"
    curves: Sequence[tuple[str, str, str]] = ()
