"""The processes of a run find each other, before jax is started: who does not come is named.

jax would wait on its own, and end with an abort from C++ that names nobody.
"""

import contextlib
import socket
import time
from collections.abc import Iterable
from typing import Any

from jdiff import exits
from jdiff.errors import UserError
from jdiff.parallel.clusters import Cluster
from jdiff.parallel.peers import Peers
from jdiff.parallel.wire import Line, is_loopback, split


class Unreached(UserError):
    """Not all processes came."""

    code = exits.PEER_LOST


def meet(cluster: Cluster, timeout: float, versions: dict[str, str]) -> Peers:
    """Waits until every process of the cluster has come to the first, and keeps the lines open.

    Args:
      timeout: seconds.
      versions: have to be the same everywhere, as all run one program.

    Raises:
      Unreached: somebody did not come in time; says who, and what to check.
      UserError: two processes of one number, other numbers of processes, or other versions.
    """
    deadline = time.monotonic() + timeout
    if cluster.index == 0:
        return Peers(cluster, _gather(cluster, deadline, timeout, versions))
    return Peers(cluster, {0: _call(cluster, deadline, timeout, versions)})


def _gather(
    cluster: Cluster, deadline: float, timeout: float, versions: dict[str, str]
) -> dict[int, Line]:
    """The first process: a line to each other one."""
    lines: dict[int, Line] = {}
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listening(cluster.coordinator, cluster.count))
        while len(lines) < cluster.count - 1:
            listening.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                missing = [i for i in range(1, cluster.count) if i not in lines]
                text = (
                    f"{len(missing)} of {cluster.count} processes did not come to "
                    f"{cluster.coordinator} within {timeout:.0f} s: {_listed(missing)}. Were they "
                    "started, and can their hosts open that port? See their own output."
                )
                raise _refused(Unreached(text), lines.values()) from None
            line = Line(connection)
            hello = _first_word(line)
            if hello is None:
                connection.close()  # somebody else's
                continue
            index, line.host = hello["index"], hello["host"]
            came = [*lines.values(), line]
            if hello["count"] != cluster.count:
                text = f"process {index} was told of {hello['count']} processes, and the first of "
                raise _refused(
                    UserError(f"{text}{cluster.count}; start all with one number."), came
                )
            if index in lines or not 0 < index < cluster.count:
                hosts = f"{line.host} and {lines[index].host if index in lines else 'the first'}"
                raise _refused(UserError(f"there are two processes {index}, on {hosts}."), came)
            if hello["versions"] != versions:
                text = f"process {index}, on {line.host}, runs {_told(hello['versions'])}; the "
                raise _refused(UserError(f"{text}first runs {_told(versions)}."), came)
            lines[index] = line
    for line in lines.values():
        line.write({"kind": "go", "host": socket.gethostname()})
    return lines


def _call(cluster: Cluster, deadline: float, timeout: float, versions: dict[str, str]) -> Line:
    """Any other process: its line to the first."""
    host, port = split(cluster.coordinator)
    hello = {
        "kind": "hello", "index": cluster.index, "count": cluster.count,
        "host": socket.gethostname(), "versions": versions,
    }  # fmt: skip
    reason = "it did not answer"
    while time.monotonic() < deadline:
        left = max(deadline - time.monotonic(), 0.1)
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 10.0))
        except OSError as error:  # not started yet, or its name is not known yet
            reason = error.strerror or str(error)
            time.sleep(0.1)
            continue
        if connection.getsockname() == connection.getpeername():  # Linux may connect us to us
            connection.close()
            continue
        line = Line(connection)
        line.write(hello)
        # The first says when it gives up; should it have vanished, we do not wait for ever.
        word = _first_word(line, max(deadline - time.monotonic(), 0.0) + 10.0)
        if word is not None and word["kind"] == "go":
            line.host = word["host"]
            return line
        if word is not None and word["kind"] == "refused":
            raise (Unreached if word["code"] == Unreached.code else UserError)(word["text"])
        reason = "it closed the connection"
        connection.close()
        time.sleep(0.1)
    raise Unreached(
        f"process {cluster.index} of {cluster.count} could not reach the first one at "
        f"{cluster.coordinator} within {timeout:.0f} s ({reason}). Is process 0 running, is this "
        "its host, and is the port open between the hosts? --coordinator=HOST:PORT names another."
    )


def _listening(address: str, backlog: int) -> socket.socket:
    host, port = split(address)
    try:
        if is_loopback(host):
            return socket.create_server((host, port), backlog=backlog)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port}: {error.strerror or error}. If another run "
            "holds it, give all processes another --coordinator=HOST:PORT (JAX_COORDINATOR_PORT)."
        ) from None


def _first_word(line: Line, timeout: float = 5.0) -> dict[str, Any] | None:
    """The first message on a new connection; None if it is none of ours."""
    deadline = time.monotonic() + timeout
    while not line.closed and (left := deadline - time.monotonic()) > 0:
        line.socket.settimeout(left)
        try:
            messages = line.read()
        except ValueError:
            return None
        if messages:
            word, *line.early = messages
            known = isinstance(word, dict) and word.get("kind") in ("hello", "go", "refused")
            return word if known else None
    return None


def _refused(error: UserError, lines: Iterable[Line]) -> UserError:
    """The error by which the run does not begin, told to those who came."""
    for line in lines:
        line.write({"kind": "refused", "text": str(error), "code": error.code})
    return error


def _listed(indices: list[int]) -> str:
    more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    return ", ".join(map(str, indices[:8])) + more


def _told(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
