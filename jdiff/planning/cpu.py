"""What XLA's CPU backend keeps that others do not.

Before jax 0.11 it drops the barriers of `jax.checkpoint`, and then joins what is computed twice
with what was computed once: outside of a scan nothing is recomputed there. Convolutions take the
batch first and kernels as [H, W, in, out]; what a gradient has in another order is copied, as soon
as it is known. Sums run in library kernels that read the factors of what they sum from memory,
spread to full size; other backends fuse those.
"""

import dataclasses

import jax

from jdiff.planning.kinds import CHEAP, VIEWS
from jdiff.planning.program import Op, Program

#: Whether the barriers of `jax.checkpoint` are gone before what is computed twice is joined.
DROPS_BARRIERS = jax.__version_info__ < (0, 11)
#: What a library's sum takes in: it reads their operands instead.
TAKEN = ("mul", "square", "neg", "convert_element_type", "reshape", "integer_pow", "add_any")
#: Fewer elements than these are not worth a plan's while.
SMALL = 2**10


def written_out(program: Program) -> Program:
    """The program with those copies as operations of their own, and its loops' bodies alike."""
    program = joined(program)
    copies = _Copies(program)
    for op in program.ops:
        if op.name == "conv_general_dilated":
            copies.of_convolution(op)
        elif op.name == "reduce_sum":
            copies.of_sum(op.inputs[0], op)
    return copies.program()


def joined(program: Program) -> Program:
    """The program without operations that do what an earlier one has done."""
    first: dict[tuple, tuple[int, ...]] = {}
    same: dict[int, int] = {}
    ops = []
    for op in program.ops:
        inputs = tuple(same.get(v, v) for v in op.inputs)
        if op.name == "optimization_barrier" and DROPS_BARRIERS:
            same |= dict(zip(op.outputs, inputs))
            continue
        alone = op.programs or op.name in ("stored_copy", "optimization_barrier")
        if inputs and not alone:
            key = (op.name, inputs, str(op.params))
            if key in first:
                same |= dict(zip(op.outputs, first[key]))
                continue
            first[key] = op.outputs
        ops.append(dataclasses.replace(op, inputs=inputs))
    outputs = tuple(same.get(v, v) for v in program.outputs)
    return dataclasses.replace(program, ops=ops, outputs=outputs)


class _Copies:
    """Collects copies: after which operation each is made, and who reads it."""

    def __init__(self, program: Program):
        self.old = program
        self.values = list(program.values)
        self.made = {v: i for i, op in enumerate(program.ops) for v in op.outputs}
        self.readers: dict[int, int] = {}
        for op in program.ops:
            for v in op.inputs:
                self.readers[v] = self.readers.get(v, 0) + 1
        self.known: dict[tuple, int] = {}
        self.after: dict[int, list[Op]] = {}
        self.instead: dict[int, dict[int, int]] = {}  # operation -> its inputs -> their copies
        self.solid = set(program.solid)

    def copy(self, v: int, like: int, kind: tuple, reader: Op) -> None:
        """v copied to the shape of `like` right after it is known, for this reader."""
        root = v
        while root in self.made and self.old.ops[self.made[root]].name in VIEWS:
            if not self.old.ops[self.made[root]].inputs:
                break
            root = self.old.ops[self.made[root]].inputs[0]
        key = (root, self.old.values[like].shape, kind)
        if key not in self.known:
            self.values.append(dataclasses.replace(self.old.values[like]))
            self.known[key] = new = len(self.values) - 1
            source = reader.equation
            self.after.setdefault(self.made.get(root, -1), []).append(
                Op("stored_copy", source, (root,), (new,))
            )
        self.instead.setdefault(id(reader), {})[v] = self.known[key]

    def of_convolution(self, op: Op) -> None:
        """Operands that are not in the order of the forward pass."""
        numbers = op.params["dimension_numbers"]
        image, kernel = op.inputs
        if numbers.lhs_spec[0] != 0:
            self.copy(image, image, numbers.lhs_spec, op)
        if numbers.rhs_spec[0] != len(numbers.rhs_spec) - 1:
            self.copy(kernel, kernel, numbers.rhs_spec, op)

    def of_sum(self, v: int, reader: Op) -> None:
        """What a sum reads."""
        shape = self.old.values[v].shape
        op = self.old.ops[self.made[v]] if v in self.made else None
        once = self.readers[v] == 1
        if op is None or op.name not in TAKEN or not once:
            if self.old.values[v].elements > SMALL:
                self._read(v, reader)
            if op is None or op.name not in TAKEN:
                return
        for u in op.inputs:
            spread = op.name == "mul" and self.old.values[v].elements > SMALL
            if spread and 1 < self.old.values[u].elements < self.old.values[v].elements:
                self.copy(u, v, ("spread",), op)
            elif once and self.old.values[u].shape == shape or op.name in VIEWS:
                self.of_sum(u, op)

    def _read(self, v: int, reader: Op) -> None:
        """A sum reads v: it is stored for that, or for all; fused readers may make it again."""
        chain = self._large(v)
        if chain is not None and self._large(chain) is not None:
            self.copy(v, v, ("read",), reader)
        else:
            self.solid.add(v)

    def _large(self, v: int) -> int | None:
        """The one operand as large as v, if v is elementwise and cheap and has no other."""
        op = self.old.ops[self.made[v]] if v in self.made else None
        if op is None or op.name not in CHEAP | VIEWS:
            return None
        own = self.old.values[v].elements
        large = [u for u in op.inputs if self.old.values[u].elements == own]
        return large[0] if len(large) == 1 else None

    def program(self) -> Program:
        """The program with the copies in it."""
        ops = list(self.after.get(-1, ()))
        for i, op in enumerate(self.old.ops):
            swap = self.instead.get(id(op), {})
            inner = tuple(written_out(p) for p in op.programs)
            inputs = tuple(swap.get(v, v) for v in op.inputs)
            ops += [dataclasses.replace(op, inputs=inputs, programs=inner), *self.after.get(i, ())]
        return Program(self.values, ops, self.old.inputs, self.old.outputs, frozenset(self.solid))
