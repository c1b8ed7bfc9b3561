"""What a program keeps in memory, value by value: which results the compiler stores, and for how long.

Elementwise results are fused into their readers and never stored, unless reading them again is
cheaper than making them again: they have several readers and are dear (an exponential), or are made
of more bytes than they have. Products, convolutions, reductions and loops are stored, and so is
what they read. A value lives from its making to its last reader.
"""

import dataclasses
import math
from collections.abc import Callable

from jdiff.planning.program import Op, Program

#: Results that are views of what they are made of, or that the compiler folds into a reader.
FREE = {
    "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "iota", "convert_element_type", "copy",
    "transpose", "rev", "sharding_constraint", "optimization_barrier", "pvary", "slice",
    "dynamic_slice", "stop_gradient", "bitcast_convert_type", "pad", "concatenate", "split",
    "copy_p", "random_wrap", "random_unwrap", "pbroadcast", "enter_manual", "leave_manual",
    "create_token", "unreduced", "mesh_cast", "reshard", "layout_constraint",
}  # fmt: skip
#: Elementwise, and dear enough that nobody computes them twice.
DEAR = {
    "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan", "erf", "erfc",
    "erf_inv", "rsqrt", "sqrt", "cbrt", "pow", "atan2", "lgamma", "digamma",
}  # fmt: skip
#: Elementwise and cheap.
CHEAP = {
    "add", "sub", "mul", "div", "neg", "max", "min", "select_n", "lt", "le", "gt", "ge", "eq", "ne",
    "and", "or", "not", "xor", "sign", "abs", "floor", "ceil", "round", "integer_pow", "square",
    "is_finite", "clamp", "rem", "shift_left", "shift_right_logical", "shift_right_arithmetic",
    "add_any", "nextafter", "conj", "real", "imag", "population_count", "clz", "zeros_like",
}  # fmt: skip
#: Read through a fusion: the reader works on what the fused value is made of.
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
    "argmin", "reduce_precision", "cumsum", "cumprod", "cummax",
}  # fmt: skip
FUSIBLE = FREE | DEAR | CHEAP
#: An elementwise result with several readers is stored if it is made of more bytes than this many
#: of its own: then reading it is cheaper than making it again.
AGAIN = 1.5


@dataclasses.dataclass(frozen=True)
class Use:
    """What a program asks of one device's memory, in bytes.

    Attributes:
      peak: the most that lives at once beyond the program's inputs and donated outputs.
      moved: that are read and written by the stored values' makers, an entry an operation.
    """

    peak: int
    moved: list[int]


def size_of(program: Program, parts: Callable[[int], int]) -> list[int]:
    """Bytes of every value on one device; `parts`: number -> into how many parts it is split."""
    return [-(-v.bytes // parts(i)) for i, v in enumerate(program.values)]


def measure(program: Program, size: Callable[[Program, int], int], donated: bool = False) -> Use:
    """Walks the program from start to end.

    Args:
      size: (program, value's number) -> bytes on one device.
      donated: whether outputs are written over inputs and take no memory of their own.
    """
    fused = _fuse(program, size)
    kept, sources = fused
    last: dict[int, int] = {}
    for i, op in enumerate(program.ops):
        stored = [v for v in op.outputs if v in kept]
        if stored or op.name not in FUSIBLE:
            for v in op.inputs:
                for s in sources[v]:
                    last[s] = i
    outputs = {s for v in program.outputs for s in sources[v]}
    free_at: dict[int, list[int]] = {}
    own = set(program.inputs)
    for s, i in last.items():
        if s not in outputs and s not in own:
            free_at.setdefault(i, []).append(s)
    live = peak = 0
    moved = [0] * len(program.ops)
    for i, op in enumerate(program.ops):
        stored = [v for v in op.outputs if v in kept]
        made = sum(size(program, v) for v in stored if not (donated and v in outputs))
        dying = sum(size(program, s) for s in free_at.get(i, ()))
        inside = max((measure(p, size).peak for p in op.programs), default=0)
        in_place = op.name in FUSIBLE or op.name in ("scatter", "scatter-add", "scan", "while", "dynamic_update_slice")
        peak = max(peak, live + inside + (max(made, dying) - dying if in_place else made))
        live += made
        live -= dying
        never = sum(
            size(program, v) for v in stored
            if v not in last and not (v in outputs)
        )
        live -= never
        peak = max(peak, live)
        if stored or op.name not in FUSIBLE:
            read = {s for v in op.inputs for s in sources[v]}
            moved[i] = sum(size(program, v) for v in {*read, *stored})
    return Use(peak, moved)


def _fuse(program: Program, size) -> tuple[set[int], list[frozenset[int]]]:
    """(stored values, of which stored values each value is made)."""
    readers: dict[int, int] = {}
    solid: set[int] = set()  # read by who cannot read through a fusion
    for op in program.ops:
        for v in set(op.inputs):
            readers[v] = readers.get(v, 0) + 1
            if op.name not in FUSIBLE and op.name not in REDUCTIONS:
                solid.add(v)
    for v in program.outputs:
        readers[v] = readers.get(v, 0) + 1
        solid.add(v)
    # What a view shows must be stored where the view must be.
    sources: list[frozenset[int]] = [frozenset()] * len(program.values)
    kept: set[int] = set(program.inputs)
    for v in program.inputs:
        sources[v] = frozenset((v,))
    for op in program.ops:
        for v in op.outputs:
            keep = op.name not in FUSIBLE
            of = frozenset().union(*(sources[u] for u in op.inputs)) if op.inputs else frozenset()
            if not keep:
                many = readers.get(v, 0) > 1
                own = size(program, v)
                total = sum(size(program, s) for s in of)
                view = len(of) == 1 and op.name in FREE and total == own
                if v in solid and not view:
                    keep = True
                elif many and op.name not in FREE and (op.name in DEAR or total > AGAIN * own):
                    keep = True
            if keep and readers.get(v, 0):
                kept.add(v)
                sources[v] = frozenset((v,))
            else:
                sources[v] = of
    return kept, sources
