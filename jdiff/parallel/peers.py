"""The processes of a run on a line of their own: who is missing, who has gone, what all agree on.

jax's collectives wait for ever for a process that has raised, and its runtime aborts without a word
in Python when one dies or never comes. So every process holds a TCP connection to the first one,
opened before jax is started and closed after its last step. Lines of JSON go over it:

  hello   to the first: index, count, host, versions   go     from the first: all are here
  stop    a signal came; who else is how far?          hold   from the first: say where you are
  at      the step that was dispatched last            until  from the first: stop after this step
  fail    an error, to be told by the first            end    from the first: leave with this code
  bye     done; from the first: all are                ping   still here
"""

import contextlib
import os
import selectors
import sys
import threading
import time
from typing import Any

from jdiff import exits
from jdiff.parallel.clusters import Cluster
from jdiff.parallel.wire import Line

#: Seconds without a word after which a process counts as lost. One that is killed closes its
#: connection and is missed at once; this is for hosts that vanish and processes that hang.
SILENCE = 40.0
_PING = 5.0
# How long the first process waits, when another reports an error, for its own: mostly the same.
_GRACE = 1.0


class Alone:
    """The only process of a run: nobody to agree with.

    Attributes:
      index, count: which process this is, of how many.
      first: whether it is the one that writes and prints.
    """

    index, count, first = 0, 1, True

    def agreed(self, step: int, wish: int | None) -> int | None:
        """The signal after which to stop behind this step, or None to go on."""
        return wish

    def fail(self, text: str, code: int) -> None:
        """Ends the other processes, and this one."""

    def finish(self) -> None:
        """Waits until the others have come to their end, too."""


class Peers(Alone):
    """The line to the other processes; from `meeting.meet`. A thread listens to it."""

    def __init__(self, cluster: Cluster, lines: dict[int, Line]):
        self.index, self.count, self.first = cluster.index, cluster.count, cluster.index == 0
        self._lines = lines
        self._changed = threading.Condition()
        self._held = False  # while the last step is agreed on, none is begun
        self._step, self._asked = 0, False
        self._until: tuple[int, int] | None = None  # the last step, the signal
        self._at: dict[int, int] | None = None
        self._bye: set[int] = set()
        self._over = False
        self._ending = threading.Lock()
        self._failed: tuple[float, str, int] | None = None
        for line in lines.values():
            line.socket.settimeout(SILENCE)  # of a send
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def agreed(self, step: int, wish: int | None) -> int | None:
        """The signal after which all processes stop behind this step, or None to go on.

        To be called after each step is dispatched. Costs a lock while nobody wishes to stop.

        Args:
          wish: a signal that came to this process, or None.
        """
        with self._changed:
            self._released()
            self._step = step
            if wish is not None and not self._asked:
                self._asked = True
                self._to_first({"kind": "stop", "signal": int(wish)})
                self._released()
            if self._until is not None and step >= self._until[0]:
                return self._until[1]
        return None

    def fail(self, text: str, code: int) -> None:
        """Tells all to end with this text, printed once, and this exit code. Does not return."""
        if self.first:
            self._end(text, code)
        self._to_first({"kind": "fail", "text": text, "code": code})
        time.sleep(_GRACE + 4)  # the first says "end" before
        self._leave(text, code)

    def finish(self) -> None:
        """Waits until all processes have come here; then a closed line is no loss."""
        self._to_first({"kind": "bye"})
        with self._changed:
            while not self._over:
                self._changed.wait()

    def _watch(self) -> None:
        try:
            self._listen()
        except Exception as error:  # without a listener, this process might wait for ever
            self._end(f"error: lost the line to the other processes: {error!r}", exits.PEER_LOST)

    def _listen(self) -> None:
        for index, line in self._lines.items():
            for message in line.early:
                self._on(index, message)
        chosen = selectors.DefaultSelector()
        for index, line in self._lines.items():
            chosen.register(line.socket, selectors.EVENT_READ, index)
        pinged = time.monotonic()
        while True:
            for key, _ in chosen.select(timeout=0.2 if self._failed else 1.0):
                line = self._lines[key.data]
                for message in line.read():
                    self._on(key.data, message)
                if line.closed:
                    chosen.unregister(line.socket)
                    self._gone(key.data, "has gone")
            now = time.monotonic()
            if self._failed and now > self._failed[0]:
                self._end(*self._failed[1:])
            if now - pinged > _PING:
                pinged = now
                self._to_all({"kind": "ping"})
            for index, line in self._lines.items():
                if not line.closed and now - line.heard > SILENCE:
                    self._gone(index, f"has not been heard of for {SILENCE:.0f} s")

    def _released(self) -> None:
        while self._held:
            self._changed.wait()

    def _on(self, index: int, message: dict[str, Any]) -> None:
        """What process `index` has said, in whichever thread."""
        with self._changed:
            getattr(self, f"_on_{message['kind']}")(index, message)
            self._changed.notify_all()

    def _on_ping(self, index: int, message: dict[str, Any]) -> None:
        pass  # that it was heard is noted by the line

    def _on_stop(self, index: int, message: dict[str, Any]) -> None:
        if self._at is None and self._until is None:
            self._at, self._by = {}, message["signal"]
            self._to_all({"kind": "hold"})
            self._on_hold(0, {})

    def _on_hold(self, index: int, message: dict[str, Any]) -> None:
        self._held = True  # no step is begun until all know the last one
        self._to_first({"kind": "at", "step": self._step})

    def _on_at(self, index: int, message: dict[str, Any]) -> None:
        self._at[index] = message["step"]
        if len(self._at) == self.count:
            until = {"kind": "until", "step": max(self._at.values()) + 1, "signal": self._by}
            self._at = None
            self._to_all(until)
            self._on_until(0, until)

    def _on_until(self, index: int, message: dict[str, Any]) -> None:
        self._until, self._held = (message["step"], message["signal"]), False

    def _on_fail(self, index: int, message: dict[str, Any]) -> None:
        if self._failed is None:
            where = f"(process {index} of {self.count}, on {self._lines[index].host})"
            text = f"{message['text']} {where}"
            self._failed = (time.monotonic() + _GRACE, text, message["code"])

    def _on_end(self, index: int, message: dict[str, Any]) -> None:
        self._leave("", message["code"])

    def _on_bye(self, index: int, message: dict[str, Any]) -> None:
        self._bye.add(index)
        if self.first and len(self._bye) == self.count:
            self._to_all({"kind": "bye"})
        self._over = not self.first or len(self._bye) == self.count

    def _gone(self, index: int, what: str) -> None:
        """A process is lost: without it no step can be made."""
        if self._over or index in self._bye or self._failed:
            return
        text = (
            f"error: process {index} of {self.count}, on {self._lines[index].host}, {what}. Its "
            "output says why, or its host was lost; the same command on all hosts resumes."
        )
        if self.first:
            self._end(text, exits.PEER_LOST)
        self._leave(text if self.index == 1 else "", exits.PEER_LOST)

    def _end(self, text: str, code: int) -> None:
        self._to_all({"kind": "end", "code": code})
        self._leave(text, code)

    def _leave(self, text: str, code: int) -> None:
        """At once: what jax runs at exit would wait for processes that have left."""
        self._ending.acquire()  # and never released: one thread leaves
        if text:
            print(text, file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _to_first(self, message: dict[str, Any]) -> None:
        if self.first:
            self._on(0, message)
        else:
            self._lines[0].write(message)

    def _to_all(self, message: dict[str, Any]) -> None:
        for line in self._lines.values():
            line.write(message)
