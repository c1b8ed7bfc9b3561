"""What a run tells: JSON lines and TensorBoard events on disk, a progress bar on the terminal."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from jdiff.training.events import Events

_UNFINISHED = ".unfinished"


class Metrics:
    """Appends numbers to metrics.jsonl and tb/; opened by `opened_metrics`."""

    def __init__(self, file: Any, events: Any, start: float):
        self._file, self._events, self._start = file, events, start

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """One line: step, kind, seconds since the run began, and the values."""
        line = {"step": step, "kind": kind, "time": round(time.time() - self._start, 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.scalar(step, f"{kind}/{name}", value)

    def picture(self, step: int, name: str, image: Any) -> None:
        """An image uint8 `[H, W, C]` for TensorBoard."""
        self._events.image(step, name, image)


class Silent:
    """Metrics that are not written: those of all processes but the first."""

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """Nothing."""

    def picture(self, step: int, name: str, image: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def opened_metrics(
    workdir: pathlib.Path, step: int, before: float = 0.0, *, write: bool = True
) -> Iterator[Metrics | Silent]:
    """Metrics that continue after `step`: lines of later steps, of a run that was cut off, go.

    Args:
      before: seconds that earlier sessions of the run took.
      write: False for a process that is not to write.
    """
    if not write:
        yield Silent()
        return
    path = workdir / "metrics.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        replace_text(path, "".join(line + "\n" for line in kept))
    events = Events(workdir / "tb", step + 1 if step else None)
    with path.open("a") as file:
        try:
            yield Metrics(file, events, time.time() - before)
        finally:
            events.close()


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file at once or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    unfinished.write_text(text)
    unfinished.replace(path)


def temporary(path: pathlib.Path) -> bool:
    """Whether `replace_text` was killed when it wrote this."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)


@contextlib.contextmanager
def progress(console: Any, total: int, done: int) -> Iterator[Any]:
    """A progress bar; yields update(step, loss, images_per_s)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task(
            "train", total=total, completed=done, text="compiling" if done < total else ""
        )

        def update(step: int, text: str) -> None:
            bar.update(task, completed=step, text=text)

        yield update


def _step_of(line: str) -> int:
    """A line's step; a line cut off by a kill is dropped (larger than any step)."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**62
