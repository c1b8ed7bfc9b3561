"""Sweeps whose points a small script trains: fake_point.py, which writes what a run would."""

import pathlib
import sys

from jdiff.experiment import defaults
from jdiff.launching import folder
from jdiff.launching.points import Point

FAKE = pathlib.Path(__file__).parent / "fake_point.py"


def points(count: int = 2, **train) -> list[Point]:
    """Points that differ by their seed; finished after ten steps."""
    made = []
    for seed in range(count):
        c = defaults()
        c.seed = seed
        c.train.update({"steps": 10} | train)
        made.append(Point(f"{seed:02}_seed={seed}", {"seed": seed}, c))
    return made


def sweep(workdir: pathlib.Path, count: int) -> folder.Sweep:
    """A folder with such points, none begun."""
    return folder.claim(workdir, "c.py", points(count), command=["sweep"])


def fake(made: folder.Sweep, name: str, plan: str) -> list[str]:
    """The words that train a point as `plan` says, see fake_point.py."""
    return [sys.executable, "-S", str(FAKE), str(made.folder), name, plan]
