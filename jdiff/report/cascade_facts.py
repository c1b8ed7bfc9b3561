"""What the folder of a cascade holds, read for its report. Only cascade.json has to be there."""

import dataclasses
import pathlib
from typing import Any

from jdiff.config import fields, from_json
from jdiff.errors import UserError
from jdiff.report.facts import Facts, Picture, gather, json_object, png

#: What evaluation draws of each stage, see `assess_cascade.PICTURES`.
PICTURES = ("generated", "input", "sample", "truth")


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """A stage.

    Attributes:
      number: 0 is the base.
      config: its fields by full name, as in cascade.json, or of its run once that has begun.
      run: what its run directory holds; None before it has begun.
      shots: its pictures by name.
      measured: its part of the cascade's evaluation, or None.
    """

    number: int
    config: dict[str, Any]
    run: Facts | None
    shots: dict[str, Picture]
    measured: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class CascadeFacts:
    """Everything that the report is made from.

    Attributes:
      folder: as given by the user.
      name: of the cascade.
      config: (full name, value) of each field.
      stages: the base first.
      evaluation: evaluation.json, or None.
    """

    folder: pathlib.Path
    name: str
    config: list[tuple[str, Any]]
    stages: list[StageFacts]
    evaluation: dict[str, Any] | None


def gather_cascade(folder: str | pathlib.Path) -> CascadeFacts:
    """Reads the folder of a cascade.

    Raises:
      UserError: it is none, or one of its files is damaged.
    """
    folder = pathlib.Path(folder)
    path = folder / "cascade.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a cascade (no cascade.json); train writes one.")
    try:
        config = from_json(path.read_text())
        parts = [config.stages[str(k)] for k in range(len(config.stages))]
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    evaluation = json_object(folder / "evaluation.json")
    measured = {stage["stage"]: stage for stage in (evaluation or {}).get("stages", ())}
    stages = []
    for k, part in enumerate(parts):
        home = folder / f"stage{k}"
        run = gather(home) if (home / "config.json").is_file() else None
        shots = {name: folder / "pictures" / f"{name}_{k}.png" for name in PICTURES}
        stages.append(
            StageFacts(
                k, dict(fields(part)) if run is None else run.config_of, run,
                {name: png(file) for name, file in shots.items() if file.is_file()},
                measured.get(k),
            )
        )  # fmt: skip
    return CascadeFacts(
        folder, config.get("name") or "", list(fields(config)), stages, evaluation
    )  # fmt: skip
