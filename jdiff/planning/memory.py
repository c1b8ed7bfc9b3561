"""What a program keeps in memory: which results the compiler stores, and for how long.

Elementwise results are fused into their readers and never stored, unless reading them again is
cheaper than making them again: they have several readers, and are dear (an exponential) or made of
more bytes than they have. Products, convolutions, reductions and loops are stored, and so is what
they read. A stored value lives from its making to its last reader. Residuals of the backward pass
are no special case: they are the values of the forward pass that it reads.
"""

import dataclasses
from collections.abc import Callable

from jdiff.planning.kinds import DEAR, FUSED, REDUCTIONS, VIEWS
from jdiff.planning.program import Op, Program

#: Bytes of a value on one device: (program, number) -> bytes.
Size = Callable[[Program, int], int]

#: An elementwise result with several readers is stored if it is made of more than this many times
#: its bytes: less is one large array and small ones, as cheap to read again as the result.
AGAIN = 1.5


@dataclasses.dataclass(frozen=True)
class Use:
    """What a program asks of one device's memory.

    Attributes:
      peak: bytes, the most that lives at once besides the program's inputs (and donated outputs).
      held: the stored values that live then; what lives inside a loop is not among them.
      moved: bytes that each operation reads and writes; 0 for what is fused into its reader. A
        loop's are those of its body, once.
    """

    peak: int
    held: frozenset[int]
    moved: list[int]


def measure(program: Program, size: Size, *, donated: bool = False) -> Use:
    """Walks the program in its order.

    Args:
      size: bytes of a value on one device.
      donated: outputs are written over inputs that are given away, and take no memory.
    """
    stored, made_of = fuse(program, size)
    end = {s for v in program.outputs for s in made_of[v]}
    last: dict[int, int] = {}
    reads: list[frozenset[int]] = []
    for i, op in enumerate(program.ops):
        runs = op.name not in FUSED or any(v in stored for v in op.outputs)
        reads.append(frozenset().union(*(made_of[v] for v in op.inputs)) if runs else frozenset())
        last |= dict.fromkeys(reads[-1], i)
        last |= {v: i for v in op.outputs if v in stored and v not in last}
    dying: list[list[int]] = [[] for _ in program.ops]
    for v, i in last.items():
        if v not in end and v not in program.inputs:
            dying[i].append(v)
    live: dict[int, int] = {}
    total = peak = 0
    held: frozenset[int] = frozenset()
    moved = []
    for i, op in enumerate(program.ops):
        written = [v for v in op.outputs if v in stored]
        made = {v: size(program, v) for v in written if not (donated and v in end)}
        inside = max((_inside(op, inner, size) for inner in op.programs), default=0)
        over = sum(live.get(v, 0) for v in dying[i] if _over(op, v, made_of))
        now = total + inside + max(sum(made.values()) - over, 0)
        live |= made
        if now > peak:
            peak, held = now, frozenset(live)
        total += sum(made.values()) - sum(live.pop(v, 0) for v in dying[i])
        moved.append(sum(size(program, v) for v in {*reads[i], *written}))
    return Use(peak, held, moved)


def fuse(program: Program, size: Size) -> tuple[set[int], list[frozenset[int]]]:
    """(the stored values, of which stored values each value is made)."""
    readers: dict[int, int] = dict.fromkeys(program.outputs, 1)
    solid = {*program.outputs, *program.solid}  # read by who cannot read through a fusion
    for op in program.ops:
        for v in set(op.inputs):
            readers[v] = readers.get(v, 0) + 1
        if op.name == "optimization_barrier" or op.name not in FUSED | REDUCTIONS:
            solid.update(op.inputs)
    stored = set(program.inputs)
    made_of = [frozenset((i,)) if i in stored else frozenset() for i in range(len(program.values))]
    for op in program.ops:
        of = frozenset().union(*(made_of[u] for u in op.inputs))
        for v in op.outputs:
            if v in readers and _is_stored(program, op, v, of, readers[v], v in solid, size):
                stored.add(v)
                made_of[v] = frozenset((v,))
            else:
                made_of[v] = of
    return stored, made_of


def _is_stored(
    program: Program, op: Op, v: int, of: frozenset[int], readers: int, solid: bool, size: Size
) -> bool:
    if op.name not in FUSED:
        return True
    own, whole = size(program, v), sum(size(program, s) for s in of)
    if op.name in VIEWS:
        return solid and (len(of) != 1 or whole != own or op.name == "transpose")
    return solid or (readers > 1 and (op.name in DEAR or whole > AGAIN * own))


def _over(op: Op, v: int, made_of: list[frozenset[int]]) -> bool:
    """Whether the operation may write over v, which nobody reads after it."""
    if op.name == "scan":
        before, carried = op.carried
        return any(v in made_of[u] for u in op.inputs[before : before + carried])
    return op.name in FUSED or op.name in ("while", "scatter-add", "dynamic_update_slice")


def _inside(op: Op, body: Program, size: Size) -> int:
    """The peak within a loop's body or a branch; the layer's slices of stacked arrays included."""
    peak = measure(body, size).peak
    if op.name != "scan":
        return peak
    slices = body.inputs[sum(op.carried) :]
    read = {v for inner in body.ops if inner.name not in FUSED for v in inner.inputs}
    return peak + sum(size(body, v) for v in slices if v in read)
