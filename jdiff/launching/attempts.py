"""An attempt at a point: the process that trains it, its log, and a note of how it goes.

The note (attempts/NAME.json) says what a run directory cannot: which process is at work and how it
ended. Whoever starts the process writes it: the sweep on this machine, or the task of an array.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jdiff.training.logs import replace_text

#: A process on another machine that has written nothing for so many seconds is taken for dead.
SILENCE = 900.0


@dataclasses.dataclass(frozen=True)
class Note:
    """What attempts/NAME.json says.

    Attributes:
      host, pid, born: the process; `born` is the kernel's start time, so that a number that was
        given out again is not taken for it. No pid: queued.
      number: of the attempt, from 1; they are counted from the last command.
      started, ended: seconds since 1970; `ended` is None while it runs.
      code: exit code; minus the signal if one killed it; None also if nobody saw it end.
      job: the scheduler's, such as 123_4.
    """

    host: str = ""
    pid: int | None = None
    born: str | None = None
    number: int = 1
    started: float = 0.0
    ended: float | None = None
    code: int | None = None
    job: str | None = None


def command(folder: pathlib.Path, name: str, *, evaluate: bool = True) -> list[str]:
    """The words that train a point: its config is that of the folder, not of the user's file."""
    words = [sys.executable, "-m", "jdiff.cli", "train",
             f"--config={folder / 'points' / name}.json", f"--workdir={folder / name}"]  # fmt: skip
    return words if evaluate else [*words, "--no-evaluate"]


def log_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file with the output of a point."""
    return folder / "logs" / f"{name}.log"


class Attempt:
    """A running process of a point; made by `start`."""

    def __init__(self, folder: pathlib.Path, name: str, process: Any, note: Note):
        self.folder, self.name, self.process, self.note = folder, name, process, note

    def poll(self) -> int | None:
        """The exit code, once it has one; then the note says so too."""
        code = self.process.poll()
        if code is not None and self.note.ended is None:
            known = None if isinstance(self.process, _Orphan) else code
            self.note = dataclasses.replace(self.note, ended=time.time(), code=known)
            write(self.folder, self.name, self.note)
        return code

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Asks it to save and end."""
        self.process.send_signal(signum)


def start(
    folder: pathlib.Path, name: str, words: Sequence[str], *, number: int = 1,
    environment: Mapping[str, str] | None = None, job: str | None = None,
) -> Attempt:  # fmt: skip
    """Starts the process of a point, in a session of its own, its output appended to its log.

    A Ctrl-C in the terminal does not reach it: who started it passes on what it needs to hear.
    """
    path = log_of(folder, name)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as log:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"# {when}, attempt {number} on {socket.gethostname()}: {shlex.join(words)}\n")
        log.flush()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )  # fmt: skip
    note = Note(
        host=socket.gethostname(), pid=process.pid, born=_born(process.pid), number=number,
        started=time.time(), job=job,
    )  # fmt: skip
    write(folder, name, note)
    return Attempt(folder, name, process, note)


def adopt(folder: pathlib.Path, name: str) -> Attempt | None:
    """The process that an earlier command left behind on this machine, if it still runs."""
    note = read(folder, name)
    if note is None or note.ended is not None or note.job or not _runs_here(note):
        return None
    return Attempt(folder, name, _Orphan(note), note)


def read(folder: pathlib.Path, name: str) -> Note | None:
    """The note of a point, None without one."""
    try:
        return Note(**json.loads((folder / "attempts" / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write(folder: pathlib.Path, name: str, note: Note) -> None:
    """Writes it at once or not at all."""
    path = folder / "attempts" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    replace_text(path, json.dumps(dataclasses.asdict(note)) + "\n")


def alive(folder: pathlib.Path, name: str, note: Note, queue: Mapping[str, str] | None) -> bool:
    """Whether what the note speaks of goes on.

    Args:
      queue: the scheduler's, {job: state}; None where there is none to ask.
    """
    if note.job and queue is not None:
        return note.job in queue  # where it may be once more, after it has ended
    if note.ended is not None:
        return False
    if note.pid is None:
        return True
    if note.host == socket.gethostname():
        return _runs_here(note)
    signs = [log_of(folder, name), folder / name / "metrics.jsonl"]
    last = max([note.started, *(sign.stat().st_mtime for sign in signs if sign.exists())])
    return time.time() - last < SILENCE


def last_words(folder: pathlib.Path, name: str, note: Note | None) -> str:
    """Why an attempt failed: the last error line of its log, else its last line, else its code."""
    if note is not None and note.code is not None and note.code < 0:
        killed = f"killed by {signal.Signals(-note.code).name}"
        return killed + (" (out of memory?)" if -note.code == signal.SIGKILL else "")
    lines = tail(log_of(folder, name), 16_384)
    begins = max((i for i, line in enumerate(lines) if line.startswith("# ")), default=-1)
    lines = [line.strip() for line in lines[begins + 1 :] if line.strip()]
    errors = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception)\b)", line)]
    if errors or lines:
        return (errors or lines)[-1].removeprefix("error: ")
    return "no output" if note is None or note.code is None else f"exit code {note.code}"


def tail(path: pathlib.Path, size: int) -> list[str]:
    """The last lines of a file within `size` bytes, the first of them perhaps cut off."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


class _Orphan:
    """A process that is no child of ours, with the face of a Popen."""

    def __init__(self, note: Note):
        self._note = note

    def poll(self) -> int | None:
        """None while it runs; how it ended is not known to us: its run directory says."""
        return None if _runs_here(self._note) else 0

    def send_signal(self, signum: int) -> None:
        if _runs_here(self._note):
            os.kill(self._note.pid, signum)


def _runs_here(note: Note) -> bool:
    if note.pid is None or note.host != socket.gethostname():
        return False
    try:
        os.kill(note.pid, 0)
    except OSError:
        return False
    return _born(note.pid) == note.born


def _born(pid: int) -> str | None:
    """The kernel's start time of a process; None if it does not tell, "" if it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] == "Z" else fields[19]
