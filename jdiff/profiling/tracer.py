"""`--profile`: records a few steps of the training loop with jax's profiler, and adds them up."""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from jdiff.errors import UserError
from jdiff.profiling import xplane
from jdiff.profiling.breakdown import STEP, Breakdown, breakdown
from jdiff.profiling.clock import Clock

FOLDER = "profile"
SUMMARY = "summary.json"


class Profile(NamedTuple):
    """Which steps to record: `count` of them from the `first` that is taken now, which is 1.

    The first steps compile and fill queues. A run that is taken up again counts anew.
    """

    first: int = 11
    count: int = 5


def profile(text: str) -> Profile:
    """Reads FIRST:COUNT, or FIRST alone.

    Raises:
        UserError: it is something else, or a number is below 1.
    """
    first, colon, count = text.partition(":")
    try:
        read = Profile(int(first), int(count) if colon else Profile().count)
    except ValueError:
        raise UserError(f"--profile={text}: give FIRST:COUNT, two numbers, as 11:5.") from None
    if min(read) < 1:
        raise UserError(f"--profile={text}: FIRST and COUNT must be at least 1.")
    return read


@contextlib.contextmanager
def recording(
    wanted: Profile | None, workdir: pathlib.Path, steps: range, clock: Clock, tell: Any,
    *, write: bool = True,
) -> Iterator[Iterable[int]]:  # fmt: skip
    """The steps to loop over; while those that are `wanted` go by, the profiler records.

    It begins and ends with the devices at rest, so that the trace holds whole steps. Afterwards
    WORKDIR/profile/summary.json says where their time went.

    Args:
        wanted: None records nothing and costs nothing.
        tell: called with a line of text.
        write: whether this process records. Of many only the first does.

    Raises:
        UserError: there are fewer steps than are wanted, or a profiler is already at work.
    """
    if wanted is None:
        yield steps
        return
    chosen = steps[wanted.first - 1 : wanted.first - 1 + wanted.count]
    if len(chosen) < wanted.count:
        raise UserError(
            f"--profile={wanted.first}:{wanted.count} goes up to step {sum(wanted) - 1} of this "
            f"start, which has {len(steps)} to take."
        )
    if not write:
        yield steps
        return
    with contextlib.ExitStack() as trace:
        yield _recorded(steps, chosen, workdir, clock, tell, trace)


def _recorded(
    steps: range, chosen: range, workdir: pathlib.Path, clock: Clock, tell: Any,
    trace: contextlib.ExitStack,
) -> Iterator[int]:  # fmt: skip
    for step in steps:
        if step == chosen[0]:
            with clock.part("profile"):
                clock.wait()
                trace.enter_context(_tracing(workdir / FOLDER, clock))
        if step not in chosen:
            yield step
            continue
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            yield step
        if step == chosen[-1]:
            with clock.part("profile"):
                clock.wait()
                trace.close()
                tell(_summarised(workdir / FOLDER))


@contextlib.contextmanager
def _tracing(folder: pathlib.Path, clock: Clock) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a function slows down what is measured
    try:
        jax.profiler.start_trace(str(folder), profiler_options=options)
    except RuntimeError as error:
        raise UserError(f"--profile: the profiler does not start: {error}") from error
    clock.annotated(jax.profiler.TraceAnnotation)
    try:
        yield
    finally:
        clock.annotated(contextlib.nullcontext)
        jax.profiler.stop_trace()


def _summarised(folder: pathlib.Path) -> str:
    """Writes the summary of the newest trace; says in a line what is in it, or why it is not."""
    path = xplane.newest(folder)
    if path is None:
        return f"profile  nothing was written to {folder}"
    try:
        found = breakdown(xplane.read(path))
    except UserError as error:
        return f"profile  {path}: {error}"
    write(found, folder, path)
    share = lambda name: f"{100 * found.split[name] / found.seconds:.0f} % {name}"
    shown = sorted(found.split, key=found.split.get, reverse=True)[:3]
    return f"profile  {folder}: {', '.join(share(name) for name in shown if found.split[name])}"


def write(found: Breakdown, folder: pathlib.Path, trace: pathlib.Path) -> None:
    """Writes summary.json, at once or not at all."""
    text = json.dumps(found.as_json() | {"trace": str(trace.relative_to(folder))}, indent=1)
    partial = folder / f".{SUMMARY}"
    partial.write_text(text + "\n")
    partial.replace(folder / SUMMARY)
