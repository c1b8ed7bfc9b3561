"""One run on many hosts: jax is told of the others, before anything else is asked of it."""

import contextlib
import importlib.metadata
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jdiff.parallel import clusters, meeting, peers, wire
from jdiff.parallel.clusters import Cluster, Given
from jdiff.pytree import PyTree

#: Seconds that processes wait for each other at the start: nodes of a job boot one by one.
CONNECT_TIMEOUT = 300
# jax ends a process, from C++ and with code 134, when another is silent for so long. It comes after
# `peers.SILENCE`, which says what happened.
_HEARTBEAT = 60

# What this process belongs to is a fact of the process, as jax.process_index() is.
_line: peers.Alone = peers.Alone()


def line() -> peers.Alone:
    """The line to the other processes of this run (`peers.Peers`), or `peers.Alone`."""
    return _line


def join(given: Given, timeout: float = CONNECT_TIMEOUT) -> str | None:
    """Joins the processes of the run, if there are others: `line()` then leads to them.

    To be called before anything that makes jax look for devices.

    Returns:
      What was found, to be printed by the first process; None for a process alone.

    Raises:
      UserError: a variable is missing, or the processes do not fit together; see `clusters.detect`
        and `meeting.meet`.
    """
    global _line
    cluster = clusters.here(given)
    if cluster is None:
        return None
    names = ("jdiff", "jax", "jaxlib")
    met = meeting.meet(cluster, timeout, {n: importlib.metadata.version(n) for n in names})
    _start(cluster, timeout)
    _line = met
    return f"{cluster.count} processes ({cluster.found}), met at {cluster.coordinator}"


def fetched(tree: PyTree) -> PyTree:
    """Arrays of all processes' devices as numpy, whole, in every process; all have to ask."""

    def fetch(a: Any) -> np.ndarray:
        if a.is_fully_addressable or a.is_fully_replicated:
            return np.asarray(a)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(fetch, tree)


def divided(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """`function` of `[N, ...]` rows, each process computing its share; all have to call it."""
    if _line.count == 1:
        return function

    def whole(rows: np.ndarray) -> np.ndarray:
        share = -(-len(rows) // _line.count)
        own = np.minimum(np.arange(share) + _line.index * share, len(rows) - 1)
        parts = multihost_utils.process_allgather(np.asarray(function(rows[own])))
        return parts.reshape(-1, *parts.shape[2:])[: len(rows)]

    return whole


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Lets the first process through, and the others when it is done; `name` is this place's."""
    if _line.count > 1 and not _line.first:
        multihost_utils.sync_global_devices(name)
    yield
    if _line.count > 1 and _line.first:
        multihost_utils.sync_global_devices(name)


def _start(cluster: Cluster, timeout: float) -> None:
    """jax.distributed, of which all processes are known to be there."""
    host, port = wire.split(cluster.coordinator)
    # Else it catches SIGTERM in C++, also before there is a loop that would heed it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)  # a warning, and the line has just been tried
    if cluster.index:
        _await(host, port, timeout)
    jax.distributed.initialize(
        cluster.coordinator, cluster.count, cluster.index, local_device_ids=cluster.devices,
        cluster_detection_method="deactivate", initialization_timeout=int(max(timeout, 60)),
        heartbeat_timeout_seconds=_HEARTBEAT,
        coordinator_bind_address=cluster.coordinator if wire.is_loopback(host) else None,
    )  # fmt: skip


def _await(host: str, port: int, timeout: float) -> None:
    """Until jax's service listens: its client would try once, and then sleep for a second."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.02)
