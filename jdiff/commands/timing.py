"""How much of a piece of work was compilation."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Clock:
    """Spans (start, end) in which jax traced, lowered or compiled."""

    spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The length of their union: a trace inside a trace counts once."""
        total, reached = 0.0, float("-inf")
        for start, end in sorted(self.spans):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total


@contextlib.contextmanager
def compile_clock() -> Iterator[Clock]:
    """Collects the compilation inside the block, in this process, by jax's own events."""
    from jax import monitoring

    clock = Clock()

    def note(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.monotonic()
            clock.spans.append((now - duration, now))

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield clock
    finally:
        monitoring.unregister_event_duration_listener(note)
