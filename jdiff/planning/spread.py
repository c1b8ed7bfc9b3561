"""How a program's values lie on a mesh, and where its devices speak, as XLA's partitioner does.

From the layout of the inputs, operation by operation: a product whose contracted dimension is split
leaves sums to add up, a constraint that asks for less splitting gathers, FSDP fetches weights and
scatters gradients by operations of its own, and attention over split tokens says in so many words
what it sends. One pass forwards, and one backwards for values that nothing had placed (noise).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jdiff.planning.kinds import REDUCTIONS, VIEWS
from jdiff.planning.program import Op, Program

#: Mesh axes of each dimension.
Spec = tuple[tuple[str, ...], ...]

#: What jax calls the collectives of a `shard_map`, and we as XLA does.
SPOKEN = {
    "psum": "all-reduce", "psum_invariant": "all-reduce", "pmax": "all-reduce",
    "pmin": "all-reduce", "all_gather": "all-gather", "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Message:
    """One collective, as every device of a group runs it.

    Attributes:
      kind: as XLA calls it.
      axes: of the mesh, along which the devices of a group lie.
      bytes: of what a device holds afterwards: of a gather the whole, of a reduce-scatter the part.
      times: how often in a step.
      hidden: whether computation can go on meanwhile: weights come ahead of use, gradients leave
        behind it, and a ring turns while its last parts are looked at.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int = 1
    hidden: bool = False

    def sent(self, mesh: Mapping[str, int]) -> float:
        """Bytes that a device sends in a step, by the algorithms that send least (rings)."""
        n = math.prod(mesh[a] for a in self.axes)
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.times * self.bytes * share.get(self.kind, (n - 1) / n)


def spec_of(sharding: Any, ndim: int) -> Spec:
    """The mesh axes of each dimension of a `NamedSharding`; axes of one device left out."""
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return tuple(_real(e, sharding.mesh.shape) for e in entries)


def spread(program: Program, inputs: list[Spec], mesh: Mapping[str, int]) -> list[Message]:
    """Fills the `spec` of every value and returns what the devices say to each other in a step."""
    for v, spec in zip(program.inputs, inputs, strict=True):
        program.values[v].spec = spec
    walk = _Walk(program, mesh)
    for op in program.ops:
        walk.visit(op)
    walk.settle()
    return walk.said


def parts(program: Program, v: int, mesh: Mapping[str, int]) -> int:
    """Into how many parts a value is split."""
    return math.prod(mesh[a] for axes in program.values[v].spec for a in axes)


def size(program: Program, v: int, mesh: Mapping[str, int]) -> int:
    """Bytes of a value on one device."""
    return -(-program.values[v].bytes // parts(program, v, mesh))


class _Walk:
    """One pass over a program: each operation gives its results their places."""

    def __init__(self, program: Program, mesh: Mapping[str, int]):
        self.program, self.mesh = program, mesh
        self.said: list[Message] = []
        self.unsummed: dict[int, tuple[str, ...]] = {}  # sums that are still to be added up
        self.readers: dict[int, list[Op]] = {}
        for op in program.ops:
            for v in op.inputs:
                self.readers.setdefault(v, []).append(op)

    def spec(self, v: int) -> Spec:
        return self.program.values[v].spec

    def shape(self, v: int) -> tuple[int, ...]:
        return self.program.values[v].shape

    def put(self, v: int, spec: Spec) -> None:
        """Places a value; axes that do not divide, or come twice, are left out."""
        seen: set[str] = set()
        entries = []
        for axes, n in zip(spec, self.shape(v)):
            axes = tuple(a for a in axes if a not in seen)
            if n % math.prod(self.mesh[a] for a in axes):
                axes = ()
            seen.update(axes)
            entries.append(axes)
        self.program.values[v].spec = tuple(entries)

    def say(self, kind: str, axes: tuple[str, ...], size: int, hidden: bool = False) -> None:
        if axes and size:
            self.said.append(Message(kind, axes, size, 1, hidden))

    def size(self, v: int) -> int:
        return size(self.program, v, self.mesh)

    def visit(self, op: Op) -> None:
        rule = _RULES.get(op.name)
        if rule is not None:
            rule(self, op)
        elif op.name in SPOKEN:
            self.spoken(op)
        elif op.name in REDUCTIONS:
            _reduce(self, op)
        else:
            _elementwise(self, op)
        if op.name in VIEWS and op.inputs and op.inputs[0] in self.unsummed:
            for v in op.outputs:
                self.unsummed[v] = self.unsummed[op.inputs[0]]

    def spoken(self, op: Op) -> None:
        axes = op.params.get("axes", op.params.get("axis_name", ()))
        axes = _real(axes, self.mesh)
        hidden = op.name == "ppermute"
        self.say(SPOKEN[op.name], axes, sum(self.size(v) for v in op.outputs), hidden)

    def sum_over(self, v: int, axes: tuple[str, ...]) -> None:
        """A result that each device along `axes` has a part of: added up now, or by its scatter."""
        if not axes:
            return
        if self._given_back(v):
            self.unsummed[v] = axes
            return
        late = not set(axes) & {"tensor"}  # gradients; sums over tensor are waited for
        self.say("all-reduce", axes, self.size(v), late)

    def _given_back(self, v: int) -> bool:
        readers = self.readers.get(v, [])
        return bool(readers) and all(
            op.name == "give_back_gradient"
            or (op.name in VIEWS and all(self._given_back(u) for u in op.outputs))
            for op in readers
        )

    def settle(self) -> None:
        """Places what nothing had placed as its readers are, backwards."""
        for op in reversed(self.program.ops):
            if op.programs or op.name in ("leave_manual", "enter_manual", "sharding_constraint"):
                continue
            for v in op.inputs:
                fits = [u for u in op.outputs if self.shape(u) == self.shape(v)]
                if fits and not any(self.spec(v)) and v not in self.program.inputs:
                    self.put(v, self.spec(fits[0]))


def _real(entry: Any, mesh: Mapping[str, int]) -> tuple[str, ...]:
    axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return tuple(a for a in axes if isinstance(a, str) and mesh[a] > 1)


def _flat(spec: Spec) -> set[str]:
    return {a for axes in spec for a in axes}


def _elementwise(walk: _Walk, op: Op) -> None:
    """As the largest operand lies; smaller ones that lie otherwise are gathered."""
    for v in op.outputs:
        shape = walk.shape(v)
        like = [u for u in op.inputs if len(walk.shape(u)) == len(shape)]
        like.sort(key=lambda u: -walk.program.values[u].bytes)
        entries: list[tuple[str, ...]] = [()] * len(shape)
        for u in like:
            for d, axes in enumerate(walk.spec(u)):
                free = not entries[d] and not set(axes) & {a for e in entries for a in e}
                if walk.shape(u)[d] == shape[d] and free:
                    entries[d] = axes
        walk.put(v, tuple(entries))
        for u in like:
            _gather(walk, u, tuple(
                e if n == m else () for e, n, m in zip(walk.spec(v), walk.shape(u), shape)
            ))  # fmt: skip


def _gather(walk: _Walk, u: int, wanted: Spec, hidden: bool = False) -> None:
    """Says what it takes to have u as `wanted` splits it; splitting more costs nothing."""
    lost, moved = [], []
    for axes, keep in zip(walk.spec(u), wanted):
        for a in axes:
            if a not in keep:
                (moved if a in _flat(wanted) else lost).append(a)
    left = -(-walk.program.values[u].bytes // math.prod(
        walk.mesh[a] for a in _flat(walk.spec(u)) - set(lost)
    ))  # fmt: skip
    walk.say("all-gather", tuple(lost), left, hidden)
    walk.say("all-to-all", tuple(moved), left, hidden)


def _constraint(walk: _Walk, op: Op) -> None:
    (v,), (u,) = op.outputs, op.inputs
    wanted = spec_of(op.params["sharding"], len(walk.shape(v)))
    _gather(walk, u, wanted)
    walk.put(v, wanted)


def _fetch(walk: _Walk, op: Op) -> None:
    (v,), (u,) = op.outputs, op.inputs
    whole = spec_of(op.params["whole"], len(walk.shape(v)))
    _gather(walk, u, whole, hidden=True)
    walk.put(v, whole)


def _give_back(walk: _Walk, op: Op) -> None:
    (v,), (u,) = op.outputs, op.inputs
    walk.put(v, spec_of(op.params["parts"], len(walk.shape(v))))
    axes = walk.unsummed.get(u, ())
    scattered = tuple(a for a in axes if a in _flat(walk.spec(v)))
    walk.say("reduce-scatter", scattered, walk.size(v), True)
    walk.say("all-reduce", tuple(a for a in axes if a not in scattered), walk.size(v), True)


def _dot(walk: _Walk, op: Op) -> None:
    (lc, rc), (lb, rb) = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    ls, rs = walk.spec(left), walk.spec(right)
    lf = [d for d in range(len(ls)) if d not in (*lc, *lb)]
    rf = [d for d in range(len(rs)) if d not in (*rc, *rb)]
    out = [*(ls[d] or rs[e] for d, e in zip(lb, rb)), *(ls[d] for d in lf), *(rs[d] for d in rf)]
    summed = {a for d, e in zip(lc, rc) for a in (ls[d] or rs[e])}
    # An axis cannot split both the sum and the result: the smaller operand is gathered.
    twice = summed & {a for axes in out for a in axes}
    if twice:
        small = min(left, right, key=lambda v: walk.program.values[v].bytes)
        whole = tuple(tuple(a for a in axes if a not in twice) for axes in walk.spec(small))
        _gather(walk, small, whole)
        summed -= twice
    walk.put(op.outputs[0], tuple(out))
    walk.sum_over(op.outputs[0], tuple(sorted(summed)))


def _convolution(walk: _Walk, op: Op) -> None:
    numbers = op.params["dimension_numbers"]
    ls, rs = walk.spec(op.inputs[0]), walk.spec(op.inputs[1])
    out: list[tuple[str, ...]] = [()] * len(ls)
    out[numbers.out_spec[0]] = ls[numbers.lhs_spec[0]]
    out[numbers.out_spec[1]] = rs[numbers.rhs_spec[0]]
    walk.put(op.outputs[0], tuple(out))
    summed = set(ls[numbers.lhs_spec[1]]) | set(rs[numbers.rhs_spec[1]])
    walk.sum_over(op.outputs[0], tuple(sorted(summed - _flat(walk.spec(op.outputs[0])))))


def _reduce(walk: _Walk, op: Op) -> None:
    spec = walk.spec(op.inputs[0])
    gone = op.params.get("axes", ()) if "axes" in op.params else ()
    for v in op.outputs:
        kept = tuple(axes for d, axes in enumerate(spec) if d not in gone)
        if len(kept) != len(walk.shape(v)):  # a cumulative one
            kept = tuple(a if d != op.params.get("axis") else () for d, a in enumerate(spec))
        walk.put(v, kept)
        walk.sum_over(v, tuple(a for d in gone for a in spec[d]))


def _reshape(walk: _Walk, op: Op) -> None:
    v, u = op.outputs[0], op.inputs[0]
    walk.put(v, regroup(walk.shape(u), walk.spec(u), walk.shape(v), walk.mesh))


def regroup(
    shape: tuple[int, ...], spec: Spec, to: tuple[int, ...], mesh: Mapping[str, int]
) -> Spec:
    """The spec after a reshape: of dimensions that merge or part, the outermost stays split."""
    out: list[tuple[str, ...]] = [()] * len(to)
    i = j = 0
    while i < len(shape) and j < len(to):
        first, start, n, m = i, j, shape[i], to[j]
        while n != m:
            if n < m:
                i += 1
                n *= shape[i]
            else:
                j += 1
                m *= to[j]
        axes = next((spec[d] for d in range(first, i + 1) if shape[d] > 1), ())
        place = next((d for d in range(start, j + 1) if to[d] > 1), start)
        if axes and to[place] % math.prod(mesh[a] for a in axes) == 0:
            out[place] = axes
        i, j = i + 1, j + 1
    return tuple(out)


def _broadcast(walk: _Walk, op: Op) -> None:
    (v,), u = op.outputs, op.inputs[0]
    out: list[tuple[str, ...]] = [()] * len(walk.shape(v))
    for d, to in enumerate(op.params["broadcast_dimensions"]):
        if walk.shape(u)[d] == walk.shape(v)[to]:
            out[to] = walk.spec(u)[d]
    walk.put(v, tuple(out))


def _transpose(walk: _Walk, op: Op) -> None:
    spec = walk.spec(op.inputs[0])
    walk.put(op.outputs[0], tuple(spec[d] for d in op.params["permutation"]))


def _squeeze(walk: _Walk, op: Op) -> None:
    spec, gone = walk.spec(op.inputs[0]), op.params["dimensions"]
    walk.put(op.outputs[0], tuple(axes for d, axes in enumerate(spec) if d not in gone))


def _stack(walk: _Walk, op: Op) -> None:
    spec, axis = walk.spec(op.inputs[0]), op.params["axis"]
    for v in op.outputs:
        if op.name == "stack":
            walk.put(v, (*spec[:axis], (), *spec[axis:]))
        else:
            walk.put(v, (*spec[:axis], *spec[axis + 1 :]))


def _same_dimensions(walk: _Walk, op: Op) -> None:
    """Slices, pads, joins: split as before, but for dimensions that change their size."""
    u = max(op.inputs, key=lambda v: walk.program.values[v].bytes)
    for v in op.outputs:
        kept = tuple(
            axes if n == m else () for axes, n, m in zip(walk.spec(u), walk.shape(u), walk.shape(v))
        )
        walk.put(v, kept)


def _lookup(walk: _Walk, op: Op) -> None:
    """A gather: batch dimensions as the indices lie, the others as the table."""
    table, indices = op.inputs[:2]
    v, numbers = op.outputs[0], op.params["dimension_numbers"]
    out: list[tuple[str, ...]] = [()] * len(walk.shape(v))
    rows = [d for d in range(len(out)) if d not in numbers.offset_dims]
    for d, axes in zip(rows, walk.spec(indices)):
        out[d] = axes
    left = set(range(len(walk.shape(table)))) - set(numbers.collapsed_slice_dims)
    for d, e in zip(numbers.offset_dims, sorted(left)):
        if walk.shape(v)[d] == walk.shape(table)[e]:
            out[d] = walk.spec(table)[e]
    walk.put(v, tuple(out))
    rows = {a for d in numbers.collapsed_slice_dims for a in walk.spec(table)[d]}
    walk.sum_over(v, tuple(rows - _flat(walk.spec(v))))


def _scatter(walk: _Walk, op: Op) -> None:
    """The gradient of a lookup: each device adds the rows of its part of the batch."""
    table, _, updates = op.inputs[:3]
    v = op.outputs[0]
    walk.put(v, walk.spec(table))
    walk.sum_over(v, tuple(_flat(walk.spec(updates)) - _flat(walk.spec(v))))


def _scan(walk: _Walk, op: Op) -> None:
    (body,), (consts, carried) = op.programs, op.carried
    given = [walk.spec(v) for v in op.inputs]
    given[consts + carried :] = [spec[1:] for spec in given[consts + carried :]]
    for _ in range(3):  # until what is carried lies after a turn as before it
        said = spread(body, given, walk.mesh)
        after = [body.values[v].spec for v in body.outputs[:carried]]
        merged = [a if any(a) else b for a, b in zip(after, given[consts : consts + carried])]
        if merged == given[consts : consts + carried]:
            break
        given[consts : consts + carried] = merged
    for v, inner in zip(op.outputs, body.outputs):
        spec = body.values[inner].spec
        walk.put(v, spec if v in op.outputs[:carried] else ((), *spec))
    times = op.params["length"]
    walk.said += [dataclasses.replace(m, times=m.times * times) for m in said]


def _while(walk: _Walk, op: Op) -> None:
    body = op.programs[-1]
    consts = op.params["cond_nconsts"]
    walk.said += spread(body, [walk.spec(v) for v in op.inputs[consts:]], walk.mesh)
    for v, inner in zip(op.outputs, body.outputs):
        walk.put(v, body.values[inner].spec)


def _cond(walk: _Walk, op: Op) -> None:
    given = [walk.spec(v) for v in op.inputs[1:]]
    said = [spread(branch, given, walk.mesh) for branch in op.programs]
    walk.said += max(said, key=lambda messages: sum(m.sent(walk.mesh) for m in messages))
    for v, inner in zip(op.outputs, op.programs[-1].outputs):
        walk.put(v, op.programs[-1].values[inner].spec)


def _enter(walk: _Walk, op: Op) -> None:
    for u, spec in zip(op.inputs, op.params["in_specs"]):
        entries = [*spec, *[None] * (len(walk.shape(u)) - len(spec))]
        _gather(walk, u, tuple(_real(e, walk.mesh) for e in entries))


def _leave(walk: _Walk, op: Op) -> None:
    for v, spec in zip(op.outputs, op.params["out_specs"]):
        entries = [*spec, *[None] * (len(walk.shape(v)) - len(spec))]
        walk.put(v, tuple(_real(e, walk.mesh) for e in entries))


_RULES = {
    "sharding_constraint": _constraint, "fetch_weight": _fetch, "give_back_gradient": _give_back,
    "dot_general": _dot, "conv_general_dilated": _convolution, "reshape": _reshape,
    "broadcast_in_dim": _broadcast, "transpose": _transpose, "squeeze": _squeeze,
    "stack": _stack, "unstack": _stack, "slice": _same_dimensions, "pad": _same_dimensions,
    "concatenate": _same_dimensions, "split": _same_dimensions, "dynamic_slice": _same_dimensions,
    "dynamic_update_slice": _same_dimensions, "gather": _lookup, "scatter-add": _scatter,
    "scan": _scan, "while": _while, "cond": _cond, "enter_manual": _enter, "leave_manual": _leave,
}  # fmt: skip
