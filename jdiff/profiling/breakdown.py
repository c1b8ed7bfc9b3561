"""What traced steps spend their time on: computation, collectives, or waiting, and for what.

For each device the moments of the traced window fall into

    compute      an operation runs
    collectives  devices exchange data and this one computes nothing meanwhile ("exposed")
    transfers    data moves between host and device, and neither of the above
    gaps         within a program, between its operations
    the rest     no program runs; named by what the training loop does then: it waits for input,
                 saves, draws samples, writes metrics; "host" is anything else, as dispatching

which is a partition: the seconds add up to the window. They are means over the devices.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jdiff.errors import UserError
from jdiff.profiling import operations, xplane
from jdiff.profiling.clock import PREFIX
from jdiff.profiling.intervals import Intervals, both, total, union, without
from jdiff.profiling.operations import COLLECTIVE, COMPUTE, CONTROL, TRANSFER

#: The name of a step's annotation.
STEP = "train"
#: Parts of the loop that a device without a program may wait for. The others are "host".
_WAITED_FOR = ("input", "checkpoint", "samples", "logging", "compile")
_SHORT = 20e3  # ns: a pause that no host makes. Streams of GPUs do not say where a program ends.


class Operation(NamedTuple):
    """One of the dearest operations: seconds a device spends in it over all traced steps.

    Those of one place in the Python, as in the blocks of a network, are one.
    """

    name: str  # XLA's, or the kernel's; of several the dearest
    doing: str  # jax's primitive and the pass, if the trace holds the program
    place: str  # in the Python, likewise
    kind: str
    seconds: float
    count: float


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Where the time of traced steps went.

    Attributes:
        steps: their numbers.
        devices: how many devices the trace holds: those of one process.
        seconds: of the window: from the first step's begin to the last one's end on every device.
        split: seconds by name, see above; they add up to `seconds`.
        hidden: seconds of collectives while the device computes.
        collectives: seconds of each kind of collective, hidden or not, the longest first.
        dearest: the operations that take longest.
    """

    steps: tuple[int, ...]
    devices: int
    seconds: float
    split: Mapping[str, float]
    hidden: float
    collectives: Mapping[str, float]
    dearest: tuple[Operation, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        out = dataclasses.asdict(self)
        out["dearest"] = [operation._asdict() for operation in self.dearest]
        return out


class _Op(NamedTuple):
    """An operation as it ran on a device, in nanoseconds."""

    name: str
    doing: str
    place: str
    what: operations.What
    start: float
    end: float
    run: Any  # of which run of a program, if that is known
    flight: bool = False  # of an asynchronous one, whose own time is at its start and its end


def breakdown(planes: Iterable[xplane.Plane], *, dearest: int = 10) -> Breakdown:
    """Adds up a trace of training steps.

    Raises:
        UserError: the trace holds no step of a training loop, or no operation of a device.
    """
    planes = list(planes)
    steps, loop = _loop(planes)
    if not steps:
        raise UserError("the trace holds no training step; jdiff train --profile records some.")
    begin = min(start for start, _ in steps.values())
    devices = {
        device: [op for op in ops if op.end > begin] for device, ops in _devices(planes).items()
    }
    devices = {device: ops for device, ops in devices.items() if ops}
    if not devices:
        raise UserError("the trace holds no operation of a device.")
    end = max(op.end for ops in devices.values() for op in ops)
    end = max(end, *(end for _, end in steps.values()))
    window = [(begin, end)]
    programs = _programs(planes)
    each = [
        _split(ops, window, loop, programs.get(device)) for device, ops in devices.items()
    ]  # fmt: skip
    mean = lambda values: sum(values) / len(devices) / 1e9
    split = {name: mean(part[name] for part in each) for name in each[0] if name != "hidden"}
    return Breakdown(
        steps=tuple(sorted(steps)),
        devices=len(devices),
        seconds=(end - begin) / 1e9,
        split=split,
        hidden=mean(part["hidden"] for part in each),
        collectives=_collectives(devices),
        dearest=_dearest(devices, dearest),
    )


def _split(
    ops: list[_Op], window: Intervals, loop: Mapping[str, Intervals], programs: Intervals | None
) -> dict[str, float]:
    """Nanoseconds by name, of one device."""
    of = lambda kind: both(union((o.start, o.end) for o in ops if o.what.kind == kind), window)
    leaves, exchange, copies = of(COMPUTE), of(COLLECTIVE), of(TRANSFER)
    # A loop or branch spans what runs in it; what is left is its own work.
    compute = union(leaves + without(of(CONTROL), union(exchange + copies)))
    exposed = without(exchange, compute)
    copying = without(copies, union(compute + exchange))
    idle = without(window, union(compute + exchange + copies))
    gaps = both(idle, _runs(ops) if programs is None else programs)
    gaps = union(gaps + [pause for pause in idle if pause[1] - pause[0] < _SHORT])
    idle = without(idle, gaps)
    out = {
        "compute": total(compute), "collectives": total(exposed), "transfers": total(copying),
        "gaps": total(gaps),
    }  # fmt: skip
    for name in _WAITED_FOR:
        out[name] = total(both(idle, loop.get(name, [])))
    out["host"] = total(idle) - sum(out[name] for name in _WAITED_FOR)
    return out | {"hidden": total(exchange) - total(exposed)}


def _runs(ops: list[_Op]) -> Intervals:
    """From the first to the last operation of each run of a program."""
    spans: dict[Any, list[float]] = {}
    for op in ops:
        if op.run is not None:
            span = spans.setdefault(op.run, [op.start, op.end])
            span[:] = min(span[0], op.start), max(span[1], op.end)
    return union((start, end) for start, end in spans.values())


def _collectives(devices: Mapping[Any, list[_Op]]) -> dict[str, float]:
    """Seconds by kind, a device's mean."""
    seconds: Counter = Counter()
    for ops in devices.values():
        spans: dict[str, list] = defaultdict(list)
        for op in (op for op in ops if op.what.kind == COLLECTIVE):
            spans[op.what.detail].append((op.start, op.end))
        for kind, pairs in spans.items():
            seconds[kind] += total(union(pairs)) / 1e9 / len(devices)
    return dict(seconds.most_common())


def _dearest(devices: Mapping[Any, list[_Op]], most: int) -> tuple[Operation, ...]:
    seconds: dict[tuple, Counter] = defaultdict(Counter)
    calls: Counter = Counter()
    for op in (op for ops in devices.values() for op in ops):
        if op.what.kind != CONTROL and not op.flight:
            detail = op.what.detail if op.what.kind == COLLECTIVE else ""
            known = (op.doing, op.place) if op.place else (op.doing, op.name)
            key = (*known, detail, op.what.kind)
            seconds[key][op.name, op.doing, op.place] += (op.end - op.start) / 1e9 / len(devices)
            calls[key] += 1 / len(devices)
    longest = sorted(seconds, key=lambda key: seconds[key].total(), reverse=True)[:most]
    return tuple(
        Operation(*seconds[key].most_common(1)[0][0], key[-1], seconds[key].total(), calls[key])
        for key in longest
    )


def _loop(planes: list[xplane.Plane]) -> tuple[dict[int, tuple], dict[str, Intervals]]:
    """({step: (start, end)}, {part of the loop: when}), from the annotations on the host."""
    steps: dict[int, tuple[float, float]] = {}
    parts: dict[str, list] = defaultdict(list)
    for plane in planes:
        if not plane.name.startswith("/host:"):
            continue
        for event in (event for line in plane.lines for event in line):
            if event.name.startswith(PREFIX):
                parts[event.name.removeprefix(PREFIX)].append((event.start, event.end))
            elif event.name == STEP and "step_num" in event.stats:
                steps[int(event.stats["step_num"])] = (event.start, event.end)
    return steps, {name: union(pairs) for name, pairs in parts.items()}


def _devices(planes: list[xplane.Plane]) -> dict[Any, list[_Op]]:
    """The operations of each device: a plane each, or on CPU events of the host's threads."""
    programs = {key: program for plane in planes for key, program in plane.programs.items()}
    found: dict[Any, list[_Op]] = {}
    for plane in planes:
        if re.fullmatch(r"/device:(TPU|GPU):\d+", plane.name):
            streams = [line for line in plane.lines if line.name.startswith("Stream #")]
            found[plane.name] = [
                op for line in streams or plane.lines for op in _on_track(line, programs)
            ]
    if any(found.values()):
        return found
    cpus: dict[Any, list[_Op]] = defaultdict(list)
    for plane in planes:
        if plane.name == "/host:CPU":
            for event in (event for line in plane.lines for event in line):
                if not event.name.startswith("ThreadpoolListener") and "hlo_op" in event.stats:
                    device = event.stats.get("device_ordinal", 0)
                    cpus[device].append(_op(event, programs))
    return cpus


def _on_track(line: xplane.Line, programs: Mapping) -> list[_Op]:
    """The operations on a GPU's stream or a TPU's "XLA Ops", and flights on "Async XLA Ops".

    What the profiler derives from these ("Steps", "Framework Ops") would count twice.
    """
    if line.name.startswith(("Stream #", "XLA Ops")):
        return [_op(event, programs) for event in line]
    if line.name != "Async XLA Ops":
        return []
    flights: dict[Any, _Op] = {}
    for number, event in enumerate(line):  # start and done share a flow
        op, flow = _op(event, programs), event.stats.get("flow", -number)
        first = flights.get(flow, op)
        flights[flow] = first._replace(
            start=min(first.start, op.start), end=max(first.end, op.end), flight=True
        )
    # The others prefetch from one of the device's memories to another.
    return [op for op in flights.values() if op.what.kind in (COLLECTIVE, TRANSFER)]


def _programs(planes: list[xplane.Plane]) -> dict[Any, Intervals]:
    """When programs run on each TPU, which says so itself."""
    return {
        plane.name: union((event.start, event.end) for event in line)
        for plane in planes
        for line in plane.lines
        if line.name == "XLA Modules" and plane.name.startswith("/device:TPU:")
    }


def _op(event: xplane.Event, programs: Mapping[int, xplane.Program]) -> _Op:
    stats = event.stats
    name, opcode = operations.instruction(event.name)
    op_name = str(stats.get("tf_op") or "")
    place = str(stats.get("source") or "")
    if hlo := stats.get("hlo_op"):
        if known := _known(programs, stats):
            opcode, op_name = known.opcode, op_name or known.op_name
            place = operations.place(known.stack) or place
        found = operations.what(hlo, opcode)
        if found.kind == COMPUTE and name != hlo:  # a kernel says itself that it is NCCL's
            kernel = operations.what(name)
            found = kernel if kernel.kind == COLLECTIVE else found
        name = hlo
    else:
        found = operations.what(name, opcode)
    doing = operations.doing(op_name)
    # What XLA made of many has the place of one of them.
    place = place if doing or not op_name else ""
    return _Op(name, doing, place, found, event.start, event.end, stats.get("run_id"))


def _known(
    programs: Mapping[int, xplane.Program], stats: Mapping[str, Any]
) -> xplane.Operation | None:
    """The instruction that an event tells of.

    A program that came out of the compilation cache is listed under another number than its events
    have, which may be that of a third one: then its name decides.
    """
    number, module = stats.get("program_id"), stats.get("hlo_module")
    first = [programs[number]] if number in programs else []
    for program in [*first, *programs.values()]:
        if program.module == module and stats["hlo_op"] in program.operations:
            return program.operations[stats["hlo_op"]]
    return None
