"""A bar of images drawn, for whoever asked for one."""

from collections.abc import Iterable, Iterator
from typing import Any

from jdiff.pytree import Array


def shown(parts: Iterable[Array], progress: Any, total: int) -> Iterator[Array]:
    """The batches `[B, ...]` as they come, and a bar that counts their rows.

    Args:
      progress: None for no bar, True for one on stderr, or a rich console.
      total: how many rows there will be.
    """
    if not progress:
        yield from parts
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True) if progress is True else progress
    columns = (TextColumn("[bold]draw"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("draw", total=total)
        for part in parts:
            bar.advance(task, len(part.block_until_ready()))
            yield part
