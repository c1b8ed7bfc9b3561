"""Waiting for batches, with an end: a reader that hangs or fails is named, the loop goes free."""

import contextlib
import os
import pathlib
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdiff import exits
from jdiff.data.pipeline import Batch, Batches, gather
from jdiff.data.sources import Info, Source, source
from jdiff.errors import UserError

_SHOWN = 3  # images named in an error


class Unreadable(UserError):
    """The data cannot be read: a file, a disk or a server has failed, or does not answer.

    Attributes:
      hung: a thread still waits, and would keep the process from leaving on its own.
    """

    code = exits.IO
    hung = False

    def saved_at(self, step: int) -> "Unreadable":
        """This error, of training that has saved what it had."""
        more = Unreadable(f"{self}. Step {step} is saved, and the same command resumes.")
        more.hung = self.hung
        return more


def readable(
    name: str, split: str, data_dir: str | os.PathLike | None = None, fields: Sequence[str] = (),
    *, mirrored: bool = False, in_memory: bool | None = None,
) -> "Noted":  # fmt: skip
    """`sources.source`, as a source that knows who reads what.

    Raises:
      Unreadable: a file or folder of the set does not let itself be read.
      UserError: as `sources.source`.
    """
    try:
        found = source(name, split, data_dir, fields=fields, mirrored=mirrored, in_memory=in_memory)
        return Noted(found)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise Unreadable(
            f"data set {name!r} cannot be read: {error.strerror or error}{where}. Is its disk or "
            "server reachable? config.data.data_dir names another place."
        ) from error


@contextlib.contextmanager
def patient(feed: Batches, source: "Noted", timeout: float) -> Iterator["Patient"]:
    """`feed`, whose next batch comes within `timeout` seconds (0: for ever) or is an error."""
    waiting = Patient(feed, source, timeout)
    try:
        yield waiting
    finally:
        waiting.close()


class Noted:
    """A source that knows which thread is reading what."""

    def __init__(self, source: Source):
        self.info: Info = source.info
        self._source = source
        self._reading: dict[int, tuple[Sequence[int], float]] = {}  # thread -> (images, since)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def gather(self, ids: Sequence[int]) -> Batch:
        """All fields of the examples at `ids`."""
        thread = threading.get_ident()
        self._reading[thread] = ids, time.monotonic()
        try:
            return gather(self._source, ids)
        except (OSError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise Unreadable(
                f"{self.name}: {_images(ids)} cannot be read: {reason or error!r}"
            ) from error
        finally:
            del self._reading[thread]

    @property
    def name(self) -> str:
        """The set and its split."""
        return f"{self.info.name} ({self.info.split})"

    def longest(self) -> str:
        """Which thread has been reading for the longest, what, and where it is."""
        if not (reading := dict(self._reading)):
            return f"no thread is reading {self.name}"
        thread, (ids, since) = min(reading.items(), key=lambda entry: entry[1][1])
        names = {t.ident: t.name for t in threading.enumerate()}
        frame = sys._current_frames().get(thread)
        where = ""
        if frame is not None:
            last = traceback.extract_stack(frame)[-1]
            where = f", in {pathlib.Path(last.filename).name}:{last.lineno} ({last.name})"
        return (
            f"thread {names.get(thread, thread)!r} has been reading {_images(ids)} of {self.name} "
            f"for {time.monotonic() - since:.0f} s{where}"
        )


class Patient:
    """Batches in time, or an error; opened by `patient`.

    One thread asks `feed`, only when a batch is wanted: the position is that of what was delivered.
    """

    def __init__(self, feed: Batches, source: Noted, timeout: float):
        self._feed, self._source, self._timeout = feed, source, timeout
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._position = feed.get_state()
        threading.Thread(target=self._serve, name="batches", daemon=True).start()

    def __iter__(self) -> "Patient":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          Unreadable: it did not come in time, or its files cannot be read.
        """
        self._wanted.put(True)
        try:
            batch, error = self._answers.get(timeout=self._timeout or None)
        except queue.Empty:
            stuck = Unreadable(
                f"no batch came within {self._timeout:g} s: {self._source.longest()}. Is the disk "
                "or server of the data reachable? config.data.timeout sets how long to wait"
            )
            stuck.hung = True
            raise stuck from None
        if error is not None:
            raise error
        self._position = self._feed.get_state()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch that was delivered."""
        return self._position

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `Batches.set_state`."""
        self._feed.set_state(state)
        self._position = self._feed.get_state()

    def close(self) -> None:
        """Ends the thread, unless it hangs."""
        self._wanted.put(False)

    def _serve(self) -> None:
        while self._wanted.get():
            try:
                self._answers.put((next(self._feed), None))
            except BaseException as error:
                self._answers.put((None, error))


def _images(ids: Sequence[int]) -> str:
    shown = ", ".join(str(int(i)) for i in ids[:_SHOWN])
    return f"images {shown}, ..." if len(ids) > _SHOWN else f"images {shown}"
