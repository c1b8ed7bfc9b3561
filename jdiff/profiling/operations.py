"""What an operation of a trace is, by the names that XLA, jax and NCCL give it.

Sources of the names: XLA's opcodes (OpenXLA, xla/hlo/ir/hlo_opcode.h), whose asynchronous forms end
in -start and -done; jax's primitives, after which XLA names an instruction ("psum.7"); NCCL's
kernels ("ncclDevKernel_AllReduce_Sum_f32_RING_LL"); CUPTI's copies ("MemcpyH2D").
"""

import os.path
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jdiff.profiling.xplane import Frame

COMPUTE, COLLECTIVE, TRANSFER, CONTROL = "compute", "collective", "transfer", "control"

#: Beginnings of the names of XLA -> the collective. The longer of two comes first.
_XLA: Mapping[str, str] = {
    "all-reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-broadcast",
    "async-collective": "collective",
}
#: jax's primitives.
_JAX: Mapping[str, str] = {
    "psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce", "pmean": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather", "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter", "psum_scatter": "reduce-scatter",
    "all_to_all": "all-to-all", "ragged_all_to_all": "all-to-all",
    "ppermute": "collective-permute", "pbroadcast": "collective-broadcast",
}  # fmt: skip
#: The words of NCCL's kernels; one kernel sends and receives for permutes and for all-to-all.
_NCCL: Mapping[str, str] = {
    "AllReduce": "all-reduce", "AllGather": "all-gather", "ReduceScatter": "reduce-scatter",
    "SendRecv": "collective-permute", "Broadcast": "collective-broadcast",
}  # fmt: skip
#: Whole names: what a permute becomes where XLA pipelines it.
_POINT_TO_POINT = ("send", "recv")
# Between a host and its devices.
_COPIES = ("MemcpyH2D", "MemcpyD2H", "infeed", "outfeed")
_CONTROL = ("while", "conditional", "call", "async-call")
_TEXT = re.compile(r"%?(?P<name>\S+) = .*?\s(?P<opcode>[a-z][a-z0-9-]*)\(", re.DOTALL)
_SUFFIX = re.compile(r"(\.(\d+|clone|remat\d*|sunk|cleaned))+$")


class What(NamedTuple):
    """What an operation is: `kind` is one of the four, `detail` the collective or the opcode."""

    kind: str
    detail: str


def instruction(text: str) -> tuple[str, str | None]:
    """(name, opcode) of an event's name: an instruction's whole text on TPUs, else its name."""
    if match := _TEXT.match(text):
        return match["name"], match["opcode"]
    return text.removeprefix("%"), None


def what(name: str, opcode: str | None = None) -> What:
    """What the instruction or kernel `name` is; its opcode decides where it is known."""
    if opcode is None:
        found = _kernel(name) or _prefixed(name) or _JAX.get(_SUFFIX.sub("", name))
    elif opcode in ("fusion", "custom-call") or opcode.startswith("async"):
        found = _prefixed(opcode) or _prefixed(name)  # what it wraps is in its name
    else:
        found = _prefixed(opcode)
    if found:
        return What(COLLECTIVE, found)
    base = _SUFFIX.sub("", opcode or name)
    base = base.removesuffix("-start").removesuffix("-done")
    if base in _POINT_TO_POINT:
        return What(COLLECTIVE, "send and recv")
    if base in _CONTROL:
        return What(CONTROL, base)
    if base.startswith(_COPIES):
        return What(TRANSFER, base)
    return What(COMPUTE, opcode or _SUFFIX.sub("", name))


def doing(op_name: str) -> str:
    """What jax's name of an operation says: "jit(step)/transpose(jvp())/dot_general" is
    "dot_general, backward"; "" for many operations that XLA made one.
    """
    name = op_name.split(";")[0].rstrip(":")
    if ":" in name:
        return ""
    primitive = name.rsplit("/", 1)[-1]
    for mark, word in (("rematted", "again"), ("transpose(", "backward"), ("jvp(", "forward")):
        if mark in name:
            return f"{primitive}, {word}"
    return primitive


def place(stack: Sequence[Frame]) -> str:
    """Where in the Python an operation comes from, as
    "Linear (layers.py:43) in _Block._mlp (dit_blocks.py:65)".
    """
    shown = (re.sub(r"\.(__call__$|<\w+>)", "", frame.function) for frame in stack)
    return " in ".join(
        f"{name} ({os.path.basename(frame.file)}:{frame.line})" for name, frame in zip(shown, stack)
    )


def _prefixed(name: str) -> str | None:
    return next((kind for prefix, kind in _XLA.items() if name.startswith(prefix)), None)


def _kernel(name: str) -> str | None:
    if not name.startswith(("ncclDevKernel", "ncclKernel")):
        return None
    return next((kind for word, kind in _NCCL.items() if word in name), "collective")
