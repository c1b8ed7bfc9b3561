"""How long a step takes at best: what bounds each operation, and each message, on a chip.

An operation takes as long as its products at the chip's peak, or its bytes at the memory's rate,
whichever is longer (Williams et al. 2009); messages take their bytes at the links' rate. Nothing is
added for launches, latency or kernels below the roof: this is what no program is faster than.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from jdiff.models.flops import of_equation
from jdiff.planning import memory
from jdiff.planning.chips import Devices
from jdiff.planning.program import Op, Program
from jdiff.planning.spread import Message

PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step.

    Attributes:
      flops: of products in 16 bits, and `wide` in 32; what is computed again counts.
      moved: bytes to and from memory.
      products, rest: seconds of products bound by the peak, and of all that memory bounds; None
        where the chip's rates are not known.
    """

    flops: float = 0.0
    wide: float = 0.0
    moved: float = 0.0
    products: float | None = 0.0
    rest: float | None = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(_add(a, b) for a, b in zip(_values(self), _values(other))))

    def times(self, n: int) -> "Work":
        """n turns of a loop."""
        return Work(*(None if v is None else n * v for v in _values(self)))


def work(program: Program, size: memory.Size, mesh: Mapping[str, int], devices: Devices) -> Work:
    """What one device does to run the program once."""
    moved = memory.measure(program, size, donated=True).moved
    total = Work()
    for op, count in zip(program.ops, moved):
        if op.programs:
            inner = [work(p, size, mesh, devices) for p in op.programs]
            turn = max(inner, key=lambda w: w.flops + w.wide + w.moved)
            total += turn.times(op.params.get("length", 1) if op.name == "scan" else 1)
        else:
            total += _one(program, op, count, mesh, devices)
    return total


def seconds(messages: Iterable[Message], mesh: Mapping[str, int], devices: Devices) -> float | None:
    """How long messages take one after the other."""
    total = 0.0
    for m in messages:
        inside = crosses(m.axes, mesh) <= devices.joined
        rate = devices.chip.link if inside else devices.chip.network
        if rate is None:
            return None
        total += m.sent(mesh) / rate
    return total


def crosses(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """How many devices lie between the first and the last of a group, itself included.

    The mesh's last axis varies first: its groups are neighbours.
    """
    names = list(mesh)
    first = min(names.index(a) for a in axes)
    return math.prod(mesh[a] for a in names[first:])


def _one(program: Program, op: Op, moved: int, mesh: Mapping[str, int], devices: Devices) -> Work:
    chip = devices.chip
    flops, wide = 0.0, False
    if op.name in PRODUCTS:
        split = {a for v in op.inputs[:2] for axes in program.values[v].spec for a in axes}
        flops = of_equation(op.equation) / math.prod(mesh[a] for a in split)
        wide = max(program.values[v].itemsize for v in op.inputs[:2]) > 2
    peak = chip.single if wide else chip.peak
    if peak is None or chip.bandwidth is None:
        return Work(0 if wide else flops, flops if wide else 0, moved, None, None)
    compute, stream = flops / peak, moved / chip.bandwidth
    bound = compute >= stream and flops > 0
    return Work(
        0 if wide else flops, flops if wide else 0, moved,
        compute if bound else 0.0, 0.0 if bound else stream,
    )  # fmt: skip


def _values(w: Work) -> tuple[float | None, ...]:
    return w.flops, w.wide, w.moved, w.products, w.rest


def _add(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
