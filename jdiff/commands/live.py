"""How the points of a sweep stand, on the terminal: a table that is drawn anew as they go on."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jdiff.launching.folder import STATES, Status, Sweep
from jdiff.report.figures import duration, number

_COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
_FIGURES = 62  # columns of the terminal that state, step, loss, speed and time take
_BAR = 16
_AROUND = 6  # lines of the terminal that the table leaves for its head and the summary


def rows(states: Mapping[str, Status], most: int | None = None, width: int = 160) -> Any:
    """A rich table, a line a point; of more than `most`, those that run or failed come first."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    shown = list(states.values())
    if most is not None and len(shown) > most:
        first = {"running": 0, "failed": 1, "stopped": 2, "queued": 3, "waiting": 4}
        kept = sorted(shown, key=lambda s: first.get(s.state, 5))[:most]
        shown = [s for s in shown if s in kept]
    longest = max((len(s.name) for s in shown), default=0)
    room = width - _FIGURES - longest
    bars, words = room >= _BAR, room - _BAR >= 12  # what a narrow terminal does without
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("point", no_wrap=True)
    table.add_column("state", no_wrap=True)
    if bars:
        table.add_column("", width=_BAR - 2)
    for name in ("step", "loss", "images/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if words:
        table.add_column("", no_wrap=True)
    for s in shown:
        again = f" #{s.attempt}" if s.attempt > 1 and s.state == "running" else ""
        cells: list[Any] = [
            Text(s.name), Text((s.doing or s.state) + again, style=_COLOURS.get(s.state, ""))
        ]  # fmt: skip
        if bars:
            done = min(s.step, s.steps)
            cells.append(ProgressBar(total=max(s.steps, 1), completed=done, width=_BAR - 2))
        cells += [
            f"{s.step:,}/{s.steps:,}", number(s.loss) if s.loss is not None else "",
            f"{s.rate:,.0f}" if s.rate else "", duration(s.seconds) if s.seconds else "",
        ]  # fmt: skip
        if words:
            more = s.error or (s.where if s.state in ("running", "queued") else "")
            left = room - _BAR
            cells.append(Text(more if len(more) <= left else more[: left - 1] + "…", style="dim"))
        table.add_row(*cells)
    return table


def summary(states: Mapping[str, Status]) -> str:
    """`12 points: 2 running, 3 failed, 7 finished`."""
    found = [s.state for s in states.values()]
    counts = [f"{found.count(state)} {state}" for state in STATES if state in found]
    return f"{len(found)} point{'s' * (len(found) != 1)}: {', '.join(counts)}"


@contextlib.contextmanager
def table(console: Any, sweep: Sweep) -> Iterator[Callable[[dict[str, Status]], None]]:
    """Yields show(states): a live table on a terminal, elsewhere a line for each change."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    if not console.is_terminal:
        before: dict[str, str] = {}

        def say(states: dict[str, Status]) -> None:
            for name, status in states.items():
                if before.get(name) not in (None, status.state) or (
                    name not in before and status.state == "running"
                ):
                    more = f": {status.error}" if status.error else ""
                    line = f"{status.state:<9}{name}{more}"
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                before[name] = status.state

        yield say
        return
    with Live(console=console, refresh_per_second=4, transient=True) as screen:

        def show(states: dict[str, Status]) -> None:
            most = max(3, console.size.height - _AROUND)
            logs = f"logs in {sweep.folder / 'logs'}; Ctrl-C saves and stops"
            words = Text(f"{summary(states)}; {logs}", style="dim")
            screen.update(Group(rows(states, most, console.width), words))

        yield show
