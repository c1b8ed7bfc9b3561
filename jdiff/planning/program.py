"""A jaxpr as one flat list of operations on numbered values, nested calls written out.

What a planner asks of a program: in which order values appear, who reads them, and how large they
are. Calls, custom derivatives and checkpoints are inlined; loops and branches stay operations that
hold programs of their own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

#: Equations that run the one jaxpr they hold, once.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")


@dataclasses.dataclass
class Value:
    """An array of the program.

    Attributes:
      shape: as the program sees it: of all devices together, or inside a shard_map of one.
      spec: the mesh axes that each dimension is split over; filled by `spread`.
    """

    shape: tuple[int, ...]
    itemsize: int
    spec: tuple[tuple[str, ...], ...]

    @property
    def elements(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass
class Op:
    """One operation: which values it reads and makes, by number.

    Attributes:
      name: of the primitive.
      equation: of the jaxpr.
      programs: a loop's body, or a `cond`'s branches.
    """

    name: str
    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    programs: tuple["Program", ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The equation's."""
        return self.equation.params

    @property
    def carried(self) -> tuple[int, int]:
        """Of a scan: how many inputs are constants, and how many of the next it carries."""
        if "ft_in" in self.params:  # jax 0.11
            constants, carry, _ = self.params["ft_in"].unpack()
            return len(constants), len(carry)
        return self.params["num_consts"], self.params["num_carry"]


@dataclasses.dataclass
class Program:
    """Operations in order.

    Attributes:
      values: by number.
      inputs, outputs: the numbers of the program's own; an output may be an input.
      solid: values that a backend stores whatever reads them.
      literals: numbers of the constants that stand in equations.
    """

    values: list[Value]
    ops: list[Op]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    solid: frozenset[int] = frozenset()
    literals: dict[tuple, int] = dataclasses.field(default_factory=dict)


def flatten(closed: ClosedJaxpr) -> Program:
    """The program of a jaxpr."""
    program = Program([], [], (), ())
    jaxpr = closed.jaxpr
    program.inputs = tuple(_new(program, v.aval) for v in jaxpr.invars)
    constants = [_new(program, v.aval) for v in jaxpr.constvars]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *program.inputs]))
    program.outputs = tuple(_write(program, jaxpr, known))
    return program


def _write(program: Program, jaxpr: Jaxpr, known: dict[Any, int]) -> list[int]:
    """Appends the equations; returns the numbers of the outputs."""

    def number(atom: Any) -> int:
        if not isinstance(atom, Literal):
            return known[atom]
        key = (str(atom.val), str(atom.aval))
        if key not in program.literals:
            program.literals[key] = _new(program, atom.aval)
        return program.literals[key]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs = [number(a) for a in equation.invars]
        inner = [j for j in _jaxprs(params.values())]
        if (name in CALLS or name == "shard_map") and inner:
            body = inner[0]
            if name == "shard_map":
                outputs = _shard_map(program, equation, body.jaxpr, inputs)
            else:
                if params.get("differentiated") and params.get("prevent_cse"):
                    inputs = _behind_barriers(program, equation, inputs)
                inside = dict(zip(body.jaxpr.invars, inputs))
                inside |= {v: _new(program, v.aval) for v in body.jaxpr.constvars}
                outputs = _write(program, body.jaxpr, inside)
            known |= dict(zip(equation.outvars, outputs))
            continue
        outputs = [_new(program, v.aval) for v in equation.outvars]
        known |= dict(zip(equation.outvars, outputs))
        programs = tuple(flatten(j) for j in inner) if name in ("scan", "while", "cond") else ()
        program.ops.append(Op(name, equation, tuple(inputs), tuple(outputs), programs))
    return [number(a) for a in jaxpr.outvars]


def _behind_barriers(program: Program, equation: Any, inputs: list[int]) -> list[int]:
    """What the backward pass of a checkpoint computes again from, kept apart from what it was."""
    outputs = [_new(program, v.aval) for v in equation.invars]
    for v, u in zip(inputs, outputs):
        program.ops.append(Op("optimization_barrier", equation, (v,), (u,)))
    return outputs


def _shard_map(program: Program, equation: Any, body: Jaxpr, inputs: list[int]) -> list[int]:
    """The body on one device, between operations that enter and leave the manual region."""
    inside = dict(zip(body.invars, [_new(program, v.aval) for v in body.invars]))
    program.ops.append(Op("enter_manual", equation, tuple(inputs), tuple(inside.values())))
    inside |= {v: _new(program, v.aval) for v in body.constvars}
    results = _write(program, body, inside)
    outputs = [_new(program, v.aval) for v in equation.outvars]
    program.ops.append(Op("leave_manual", equation, tuple(results), tuple(outputs)))
    return outputs


def _new(program: Program, aval: Any) -> int:
    shape = tuple(getattr(aval, "shape", ()))
    program.values.append(Value(shape, _itemsize(aval), ((),) * len(shape)))
    return len(program.values) - 1


def _itemsize(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    if dtype is None:  # a token
        return 0
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return jnp.dtype(dtype).itemsize


def _jaxprs(values: Sequence[Any]) -> list[ClosedJaxpr]:
    found = []
    for value in values:
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item)
            elif isinstance(item, Jaxpr):
                found.append(ClosedJaxpr(item, ()))
    return found
