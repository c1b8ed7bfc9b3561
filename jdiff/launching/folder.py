"""A sweep's folder: what it consists of, and how each point stands, read from its run directory.

sweep.json  points/NAME.json  NAME/ (run directories)  logs/NAME.log  attempts/NAME.json
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdiff import config as configs
from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import attempts
from jdiff.launching.points import Point
from jdiff.training.logs import replace_text

#: What makes a folder a sweep's.
FILE = "sweep.json"
STATES = ("running", "queued", "waiting", "stopped", "failed", "finished")
_LOCK = ".lock"
_STOPPED = {exits.REQUEUE, exits.INTERRUPTED, 128 + 15, -15, -2, -1}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep as its sweep.json has it.

    Attributes:
      folder: where it lies.
      points: {name: overrides}, in order, with those that sweep() no longer yields.
      current: the names of those that it does yield.
      steps: {name: training steps when finished}.
      evaluate: whether a point is finished only when it is evaluated.
      source: the config file, as it was given.
      command: the words of the last `jdiff sweep` in it.
    """

    folder: pathlib.Path
    points: dict[str, dict[str, Any]]
    current: tuple[str, ...]
    steps: dict[str, int]
    evaluate: bool
    source: str
    command: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Status:
    """How a point stands.

    Attributes:
      state: one of STATES.
      doing: of a running point: "starting", "training" or "evaluating".
      step, steps: done, and wanted.
      loss, rate: of the last line of its metrics; images a second.
      seconds: of all its sessions, as its run tells.
      error: the last error line of one that failed.
      where: the process or job.
      attempt: the number of the last.
    """

    name: str
    state: str
    doing: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    rate: float | None = None
    seconds: float | None = None
    error: str = ""
    where: str = ""
    attempt: int = 0


def is_sweep(folder: str | pathlib.Path) -> bool:
    """Whether a folder is a sweep's."""
    return (pathlib.Path(folder) / FILE).is_file()


def read(folder: str | pathlib.Path) -> Sweep:
    """The sweep of a folder.

    Raises:
      UserError: there is none, or its sweep.json cannot be read.
    """
    folder = pathlib.Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a sweep (no {FILE}); `jdiff sweep` writes one.")
    try:
        tree = json.loads(path.read_text())
        rows = tree["points"]
        return Sweep(
            folder=folder,
            points={row["name"]: row["overrides"] for row in rows},
            current=tuple(row["name"] for row in rows if row["current"]),
            steps={row["name"]: row["steps"] for row in rows},
            evaluate=tree["evaluate"],
            source=tree["config"],
            command=tuple(tree.get("command", ())),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); move it away.") from None


def known(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The names that points of this folder got before, with their overrides."""
    return read(folder).points if is_sweep(folder) else {}


def check(folder: pathlib.Path, points: Sequence[Point]) -> None:
    """Whether a folder may take these points; nothing is written.

    Raises:
      UserError: it holds something else, or a sweep whose points had other configs (the point and
        the fields are named).
    """
    from jdiff.runs import unlike

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a directory.")
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} is the directory of a run; name another --workdir for a sweep.")
    if folder.is_dir() and not is_sweep(folder):
        if all(path.name == _LOCK for path in folder.iterdir()):
            return
        raise UserError(f"{folder} is not empty and is not a sweep; name another --workdir.")
    before = known(folder)
    for point in points:
        path = _config_of(folder, point.name)
        if point.name not in before or not path.is_file():
            continue
        if differ := unlike(configs.load(str(path)), point.config):
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(
                f"{folder} belongs to another config: in {point.name}, {'; '.join(differ[:3])}"
                f"{more}. Name another --workdir, or move this one away."
            )


def claim(
    folder: pathlib.Path, source: str, points: Sequence[Point], *, evaluate: bool = True,
    command: Sequence[str] = (),
) -> Sweep:  # fmt: skip
    """Makes a folder that of these points, or adds them to it; see `check`."""
    check(folder, points)
    try:
        (folder / "points").mkdir(parents=True, exist_ok=True)
        sweep = dataclasses.replace(
            planned(folder, source, points), evaluate=evaluate, command=tuple(command)
        )
        for point in points:
            replace_text(_config_of(folder, point.name), configs.to_json(point.config) + "\n")
        write(sweep, look(sweep))
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written: {error.strerror}.") from error
    return sweep


def planned(folder: pathlib.Path, source: str, points: Sequence[Point]) -> Sweep:
    """The sweep that `claim` would make; nothing is written."""
    before = read(folder) if is_sweep(folder) else Sweep(folder, {}, (), {}, True, source)
    return Sweep(
        folder=folder,
        points=before.points | {point.name: point.overrides for point in points},
        current=tuple(point.name for point in points),
        steps=before.steps | {point.name: point.config.train.steps for point in points},
        evaluate=before.evaluate,
        source=source,
    )


def write(sweep: Sweep, states: Mapping[str, Status]) -> None:
    """sweep.json, with the states as they were at this look; the truth is in the runs."""
    rows = [
        {"name": name, "state": states[name].state, "steps": sweep.steps[name],
         "current": name in sweep.current, "overrides": overrides}
        for name, overrides in sweep.points.items()
    ]  # fmt: skip
    tree = {"config": sweep.source, "command": sweep.command, "evaluate": sweep.evaluate,
            "points": rows}  # fmt: skip
    replace_text(sweep.folder / FILE, json.dumps(tree, indent=2) + "\n")


def chosen(sweep_names: Sequence[str], only: str | None) -> list[str]:
    """The names that a pattern means, all of them for None.

    Raises:
      UserError: it means none.
    """
    found = [n for n in sweep_names if only is None or fnmatch.fnmatchcase(n, only)]
    if not found:
        shown = ", ".join(sweep_names[:6]) + (", ..." if len(sweep_names) > 6 else "")
        raise UserError(f"--only={only} means none of the points: {shown}.")
    return found


def look(sweep: Sweep, queue: Mapping[str, str] | None = None) -> dict[str, Status]:
    """How every point stands; `queue` is the scheduler's, {job: state}."""
    return {name: status(sweep, name, queue) for name in sweep.points}


def status(sweep: Sweep, name: str, queue: Mapping[str, str] | None = None) -> Status:
    """How a point stands, by its run directory and the note of its last attempt."""
    folder = sweep.folder / name
    described = _json(folder / "run.json")
    note = attempts.read(sweep.folder, name)
    last = _last_line(folder / "metrics.jsonl")
    steps = sweep.steps[name]
    trained = described.get("state") == "finished" and last.get("step", 0) >= steps
    measured = _json(folder / "evaluation.json").get("settings", {}).get("step", -1) >= steps
    times = [described.get("wall_seconds") or 0.0, last.get("time") or 0.0]
    seen = Status(
        name, "waiting", step=last.get("step", 0), steps=steps, loss=last.get("loss"),
        rate=last.get("images_per_s"), seconds=max(times) or None,
        attempt=note.number if note else 0, where=_where(note),
    )  # fmt: skip
    finished = dataclasses.replace(seen, state="finished")
    failed = note is not None and note.code is not None and note.code != exits.OK
    complete = trained and (measured or not sweep.evaluate) and not failed
    if complete and (note is None or note.ended is not None):
        return finished
    if note is not None and attempts.alive(sweep.folder, name, note, queue):
        if note.pid is None or (queue or {}).get(note.job or "") == "PENDING":
            return dataclasses.replace(seen, state="queued")
        doing = "evaluating" if trained else "training" if last.get("step") else "starting"
        return dataclasses.replace(seen, state="running", doing=doing)
    if complete:
        return finished
    state = described.get("state")
    if note is not None and (failed or (note.code == exits.OK and not state)):
        state = "stopped" if note.code in _STOPPED else "failed"
    elif note is not None and note.ended is None:
        return dataclasses.replace(
            seen, state="failed", error="ended without a word: killed, or its machine went down"
        )
    if state == "failed":
        error = attempts.last_words(sweep.folder, name, note)
        return dataclasses.replace(seen, state="failed", error=error)
    # Stopped also: finished, but more is wanted of it now; and "running" though nobody is at it.
    return dataclasses.replace(seen, state="stopped") if state else seen


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder for one command at a time; the kernel lets go when the process ends.

    Raises:
      UserError: another command holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder} is in use by a `jdiff sweep` ({holder}).") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def _config_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "points" / f"{name}.json"


def _where(note: attempts.Note | None) -> str:
    if note is None:
        return ""
    return f"job {note.job}" if note.job else f"process {note.pid} on {note.host}"


def _json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; nothing if there is none, or it is being written."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _last_line(path: pathlib.Path) -> dict[str, Any]:
    """The last training line of metrics.jsonl that is whole."""
    for text in reversed(attempts.tail(path, 16_384)):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line and line.get("kind", "train") == "train":
            return line
    return {}
