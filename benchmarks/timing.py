"""What the benchmarks share: rivals timed side by side, and a table of ratios."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def race(rivals: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Seconds of each rival: the best of `rounds`, taken in turn so that all see the same machine.

    Each is called once to compile, and in its turn for at least a fifth of a second, so that cold
    caches or the threads that the one before left spinning do not decide a short race.
    """
    for run in rivals.values():
        jax.block_until_ready(run())
    best = dict.fromkeys(rivals, float("inf"))
    for _ in range(rounds):
        for name, run in rivals.items():
            turn = start = time.perf_counter()
            while start - turn < 0.2:
                jax.block_until_ready(run())
                end = time.perf_counter()
                best[name], start = min(best[name], end - start), end
    return best


def table(title: str, rows: list[tuple[str, str, str, str]]) -> None:
    """Prints rows of (what, figure, limit, verdict) under a title and the machine's description."""
    from rich.console import Console
    from rich.table import Table

    device = jax.devices()[0]
    where = f"{device.platform} {device.device_kind}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    out = Table("what", "measured", "limit", "", title=f"{title}\n{where}; {versions}")
    for row in rows:
        out.add_row(*row)
    Console(width=110).print(out)


def verdict(value: float, limit: float, *, at_least: bool = False) -> str:
    """ok or MISSED."""
    return "ok" if (value >= limit if at_least else value <= limit) else "MISSED"
