"""What a run directory holds, read for the report. Only config.json has to be there."""

import base64
import dataclasses
import json
import math
import pathlib
from typing import Any

from jdiff.config import fields, from_json
from jdiff.errors import UserError

# Pictures of training shown in the report: the first, the last, and evenly in between.
_PICTURES = 12


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG of samples at a training step, as a data URI."""

    step: int
    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that the report is made from.

    Attributes:
      workdir: as given by the user.
      config: (full name, value) of each field.
      run: run.json, empty if it is missing.
      lines: the training lines of metrics.jsonl, by rising step.
      pictures: samples over training, by rising step.
      evaluation: evaluation.json, or None.
      spent: seconds of wall time by what they went into, summed over the lines of that kind.
      trace: profile/summary.json, or None.
    """

    workdir: pathlib.Path
    config: list[tuple[str, Any]]
    run: dict[str, Any]
    lines: list[dict[str, Any]]
    pictures: list[Picture]
    evaluation: dict[str, Any] | None
    spent: dict[str, float]
    trace: dict[str, Any] | None

    @property
    def config_of(self) -> dict[str, Any]:
        """Config values by full name."""
        return dict(self.config)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one number of the training lines, where it is finite."""
        kept = [
            (line["step"], float(line[name]))
            for line in self.lines
            if isinstance(line.get(name), int | float) and math.isfinite(line[name])
        ]
        return [step for step, _ in kept], [value for _, value in kept]


def gather(workdir: str | pathlib.Path) -> Facts:
    """Reads a run directory.

    Raises:
      UserError: it is not a run directory, or one of its JSON files is damaged.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if not workdir.is_dir():
        raise UserError(f"{workdir} does not exist; name the directory of a run.")
    if not path.is_file():
        raise UserError(f"{workdir} is not a run directory (no config.json); train writes one.")
    try:
        config = from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    lines = _read_lines(workdir / "metrics.jsonl")
    return Facts(
        workdir=workdir,
        config=list(fields(config)),
        run=json_object(workdir / "run.json") or {},
        lines=_training(lines),
        pictures=_pictures(workdir / "samples"),
        evaluation=json_object(workdir / "evaluation.json"),
        spent=_spent(lines),
        trace=json_object(workdir / "profile" / "summary.json"),
    )


def json_object(path: pathlib.Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if it is not there.

    Raises:
      UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no JSON object); move it away.")
    return found


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """All lines; the last one may be cut off, as by a kill or while it is written."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            found.append(line)
    return found


def _training(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # A step done again after a resume counts once.
    by_step = {line["step"]: line for line in lines if line.get("kind", "train") == "train"}
    return [by_step[step] for step in sorted(by_step)]


def _spent(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Every line tells of its own stretch of time."""
    total: dict[str, float] = {}
    for line in lines:
        if line.get("kind") == "spent":
            for name, value in line.items():
                if name not in ("step", "kind", "time") and isinstance(value, int | float):
                    total[name] = total.get(name, 0.0) + value
    return total


def _pictures(folder: pathlib.Path) -> list[Picture]:
    files = sorted(folder.glob("step_*.png"))
    if len(files) > _PICTURES:
        last = len(files) - 1
        files = [files[round(i * last / (_PICTURES - 1))] for i in range(_PICTURES)]
    return [_picture(file) for file in files]


def _picture(file: pathlib.Path) -> Picture:
    return png(file, int(file.stem.removeprefix("step_")))


def png(file: pathlib.Path, step: int = 0) -> Picture:
    """A PNG file as it stands in a page."""
    data = file.read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))  # the IHDR chunk
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return Picture(step, uri, width, height)
