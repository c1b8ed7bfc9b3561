"""One end of a TCP connection that carries lines of JSON, and the addresses of such."""

import contextlib
import json
import socket
import threading
import time
from typing import Any


class Line:
    """One end of a connection: whole lines in and out.

    Attributes:
      host: the other's name.
      heard: when something came last, by the monotonic clock.
      closed: whether the other has gone.
      early: messages that were read but not yet taken.
    """

    def __init__(self, connection: socket.socket, host: str = ""):
        self.socket, self.host = connection, host
        self.heard, self.closed = time.monotonic(), False
        self.early: list[dict[str, Any]] = []
        self._rest = b""
        self._writing = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self) -> list[dict[str, Any]]:
        """The messages that have come; `closed` is true after the last."""
        try:
            new = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            new = b""
        self.closed = not new
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [json.loads(line) for line in lines]

    def write(self, message: dict[str, Any]) -> None:
        """Sends; that the other has gone is noticed by who reads."""
        with self._writing, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach this name."""
    return host in ("localhost", "::1") or host.startswith("127.")


def split(address: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT as (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
