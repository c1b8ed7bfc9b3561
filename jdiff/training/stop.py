"""Being asked to stop: SIGTERM and SIGUSR1 from a scheduler, Ctrl-C from a person."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from jdiff import exits
from jdiff.errors import Leaving

#: SIGTERM is the notice of a preemption everywhere; SIGUSR1 is what `sbatch --signal` is given.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Leaving):
    """Training was asked to stop and has saved.

    Attributes:
      step: the step that is saved, None before and after training.
      signal: what asked.
      code: the exit code: 75 for a scheduler to start the run again, 130 after Ctrl-C.
    """

    def __init__(self, step: int | None, signum: int):
        self.step, self.signal = step, signum
        self.code = exits.INTERRUPTED if signum == signal.SIGINT else exits.REQUEUE
        where = "with nothing to save" if step is None else f"at step {step}, saved"
        super().__init__(
            f"stopped by {signal.Signals(signum).name} {where}; the same command resumes."
        )


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Collects the signals, for a loop to act on; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)

    with _handled(note):
        yield asked


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """While there is nothing to save: a scheduler's signal raises `Stopped`."""

    def leave(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(None, signum)

    with _handled(leave):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    try:
        before = {s: signal.signal(s, handler) for s in SIGNALS}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = {}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
