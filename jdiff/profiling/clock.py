"""The wall time of a training loop by what it went into, right under asynchronous dispatch.

A host that waits for its next batch does no harm while the devices still compute the steps they
were given. So the clock notes two things: what the loop is doing (`part`), and when each step that
was dispatched is finished, which a thread of its own waits for. Whenever a step is running, the
time is the steps'; only otherwise it is that of what the loop is doing. The parts add up to the
wall time.
"""

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from jdiff.profiling.intervals import both, total, union

#: How parts are called in a trace: "jdiff input". Of "jdiff:input" viewers show the second half.
PREFIX = "jdiff "
STEPS = "steps"
#: In the order in which reports name them.
PARTS = (STEPS, "input", "checkpoint", "samples", "logging", "compile", "start", "profile", "other")
#: What training at an even pace consists of; the others are pauses.
TRAINING = (STEPS, "input", "checkpoint", "logging", "other")
_CLOSE_S = 5.0  # how long to wait for the thread, whose device may hang


class Output(Protocol):
    """What a step gives back, as a jax.Array."""

    def block_until_ready(self) -> Any:
        """Returns when it is computed."""


class Clock:
    """Splits wall time, from where it is made on; steps may be dispatched once it is entered.

    >>> with Clock() as clock:
    ...     clock.begin("other")
    ...     for _ in range(1000):
    ...         with clock.part("input"):
    ...             batch = next(feed)
    ...         begun = clock.now()
    ...         state, values = step(state, batch)
    ...         clock.dispatched(values["loss"], begun)
    ...     clock.wait()
    ...     print(clock.settle())
    """

    def __init__(self, part: str = "start", now: Callable[[], float] = time.perf_counter):
        self.now = now
        self._marks = [(now(), part)]  # from when on the loop does what
        self._parts = [part]  # what it does, and what that is inside of
        self._finished = _Finished(now)
        self._annotate: Callable[[str], Any] = contextlib.nullcontext

    def __enter__(self) -> "Clock":
        self._finished.open()
        return self

    def __exit__(self, *_: Any) -> None:
        self._finished.close()

    def part(self, name: str) -> "_Part":
        """`with clock.part("input"):` what happens inside is that, not what it happens in."""
        return _Part(self, name)

    def begin(self, name: str) -> None:
        """From here on, outside of any `part`, the loop does this."""
        self._parts[0] = name
        self._mark()

    def annotated(self, annotate: Callable[[str], Any]) -> None:
        """Parts are written into a trace too: `annotate(name)` gives a context manager."""
        self._annotate = annotate

    def dispatched(self, output: Output, begun: float) -> None:
        """A step was given to the devices at `begun`: they work from there until it is ready."""
        self._finished.watch(output, begun)

    def wait(self) -> None:
        """Until every step that was dispatched is ready."""
        self._finished.wait()

    def settle(self) -> dict[str, float]:
        """Seconds by part since the last call, for all of `PARTS`."""
        now = self.now()
        running = union(self._finished.taken(now))
        marks, self._marks = [*self._marks, (now, "")], [(now, self._parts[-1])]
        spans: dict[str, list[tuple[float, float]]] = {name: [] for name in PARTS}
        for (start, name), (end, _) in zip(marks, marks[1:]):
            spans[name if name in spans else "other"].append((start, end))
        seconds = dict.fromkeys(PARTS, 0.0)
        for name, pairs in spans.items():
            whole = union(pairs)
            busy = total(both(whole, running))
            seconds[STEPS] += busy
            seconds[name] += total(whole) - busy
        return seconds

    def _mark(self) -> None:
        self._marks.append((self.now(), self._parts[-1]))


class _Part:
    """One stay in a part of the loop."""

    __slots__ = ("_annotation", "_clock", "_name")

    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock._parts.append(self._name)
        self._clock._mark()
        self._annotation = self._clock._annotate(PREFIX + self._name)
        self._annotation.__enter__()

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._annotation.__exit__(kind, error, where)
        self._clock._parts.pop()
        self._clock._mark()


class _Finished:
    """Waits for outputs, in a thread, and notes when each was ready."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting: collections.deque[float] = collections.deque()  # when they were begun
        self._done: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name="jdiff clock")

    def open(self) -> None:
        self._thread.start()

    def watch(self, output: Output, begun: float) -> None:
        with self._changed:
            self._waiting.append(begun)
        self._queue.put(output)

    def taken(self, now: float) -> list[tuple[float, float]]:
        """When steps ran since the last call; those not ready, or not seen to be, run until now."""
        with self._changed:
            done, self._done = self._done, []
            return done + [(begun, now) for begun in self._waiting]

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        """Waits for the newest of what was dispatched, so that a loop that runs ahead of its
        devices does not wake this thread at every step: those before were begun before it, one was
        ready after another, and the devices had no rest in between.
        """
        while (output := self._queue.get()) is not None:
            outputs = [output]
            while not self._queue.empty():
                outputs.append(self._queue.get())
            closing = outputs[-1] is None
            count = len(outputs) - closing
            with contextlib.suppress(Exception):  # the loop meets the same error, and says so
                outputs[count - 1].block_until_ready()
            del output, outputs  # their memory is not ours to keep
            with self._changed:
                now = self._now()
                self._done += [(self._waiting.popleft(), now) for _ in range(count)]
                self._changed.notify_all()
            if closing:
                return
