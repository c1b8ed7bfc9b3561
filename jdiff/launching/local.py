"""A sweep on this machine: some points at a time, each a process of its own, until all are done."""

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jdiff import exits
from jdiff.errors import UserError
from jdiff.launching import attempts, folder
from jdiff.launching.folder import Status, Sweep

_LOOK = 0.2  # seconds between two looks at the processes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What happens again, whenever the command is: these are failures at once.
_FINAL = {exits.USER, exits.DIVERGED}


def run(
    sweep: Sweep, names: Sequence[str], *, slots: Sequence[Mapping[str, str]], retries: int = 0,
    command: Callable[[str], list[str]] | None = None,
    tell: Callable[[dict[str, Status]], None] = lambda states: None,
) -> int | None:  # fmt: skip
    """Trains the points that are not finished; returns the signal that asked to stop, or None.

    One that fails never stops the others. On SIGINT, SIGTERM or SIGHUP every process is told to
    save and end; a second SIGINT kills them. What an earlier command left running is waited for.

    Args:
      names: of the points, in the order in which they start.
      slots: the environment of each place, e.g. {"CUDA_VISIBLE_DEVICES": "0"}; as many points run
        at a time as there are places.
      retries: how often a point that failed is started again. A mistake in the config and a loss
        that is not finite come again whatever one does, and are not tried again.
      command: the words that train a point; `attempts.command` unless given.
      tell: called with the states of all points at every look.
    """
    command = command or (
        lambda name: attempts.command(sweep.folder, name, evaluate=sweep.evaluate)
    )
    running: dict[str, attempts.Attempt] = {}
    for name in sweep.points:
        if left := attempts.adopt(sweep.folder, name):
            running[name] = left
    states = folder.look(sweep)
    free = collections.deque(slots)
    places: dict[str, Mapping[str, str]] = {}
    todo = collections.deque(
        (name, 1) for name in names if name not in running and states[name].state != "finished"
    )
    with _signals() as asked:
        try:
            passed_on = 0
            while todo or running:
                while todo and free and not asked.signals:
                    name, number = todo.popleft()
                    places[name] = free.popleft()
                    running[name] = attempts.start(
                        sweep.folder, name, command(name), number=number,
                        environment=places[name],
                    )  # fmt: skip
                if asked.signals:
                    todo.clear()
                    passed_on = _pass_on(running, asked.signals, passed_on)
                ended = [name for name, one in running.items() if one.poll() is not None]
                for name in ended:
                    attempt = running.pop(name)
                    if name in places:
                        free.append(places.pop(name))
                    if _again(folder.status(sweep, name), attempt, retries) and not asked.signals:
                        todo.append((name, attempt.note.number + 1))
                before, states = states, {}
                for name in sweep.points:
                    states[name] = before[name]
                    if name in running or name in ended:
                        now = folder.status(sweep, name)
                        # What has ended since we polled has not been noted as ended yet.
                        if name in ended or now.state == "running":
                            states[name] = now
                if any(states[name].state != before[name].state for name in states):
                    folder.write(sweep, states)
                tell(states)
                if running:
                    asked.event.wait(_LOOK)
                    asked.event.clear()
        except BaseException:
            for attempt in running.values():  # nothing is left behind by a defect of ours
                attempt.stop()
            raise
    folder.write(sweep, folder.look(sweep))
    return asked.signals[0] if asked.signals else None


def places(parallel: int | None, gpus: int | None) -> list[dict[str, str]]:
    """The environments of as many places as points are to run at a time.

    Args:
      parallel: places; 1, or with `gpus` as many as the machine has GPUs for.
      gpus: of each place; None leaves the devices as they are.

    Raises:
      UserError: there are not as many GPUs.
    """
    if gpus is None:
        return [{} for _ in range(parallel or 1)]
    found = _gpus()
    fit = len(found) // gpus
    if fit < (parallel or 1):
        raise UserError(
            f"--gpus={gpus} for each of {parallel or 1} points: this machine shows {len(found)}."
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(found[i * gpus : (i + 1) * gpus])}
        for i in range(parallel or fit)
    ]


def _gpus() -> list[str]:
    """The names of the GPUs that processes of ours may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(i) for i, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def _again(status: Status, attempt: attempts.Attempt, retries: int) -> bool:
    """Whether a point whose attempt has ended is to be started again by this command."""
    if status.state == "finished" or attempt.note.number > retries:
        return False
    return status.state == "failed" and attempt.note.code not in _FINAL


def _pass_on(running: Mapping[str, Any], heard: Sequence[int], passed_on: int) -> int:
    """Tells the processes to save and end, once; kills them after a second Ctrl-C."""
    level = 2 if len(heard) > 1 and heard[-1] == signal.SIGINT else 1
    if level > passed_on:
        for attempt in running.values():
            attempt.stop(signal.SIGKILL if level == 2 else signal.SIGTERM)
    return max(level, passed_on)


@dataclasses.dataclass
class _Asked:
    """The signals that have come, and an event that the first one sets."""

    signals: list[int]
    event: threading.Event


@contextlib.contextmanager
def _signals() -> Iterator[_Asked]:
    asked = _Asked([], threading.Event())

    def note(signum: int, frame: Any) -> None:
        asked.signals.append(signum)
        asked.event.set()

    try:
        before = {s: signal.signal(s, note) for s in _SIGNALS}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = {}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
