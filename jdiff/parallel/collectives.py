"""The collectives of a compiled program, read from XLA's text: what devices say to each other.

`compiled.as_text()` of `jax.jit(f).lower(...).compile()` on any backend. Tests assert from it that
a layout moves what it should and nothing else; a plan adds up the bytes.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from jdiff.errors import UserError

#: What XLA calls them.
KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as every device of a group runs it.

    Attributes:
      kind: one of `KINDS`.
      arrays: (dtype, shape) of what each device holds afterwards; several where XLA combined them.
      groups: the devices that talk to each other, numbered in the order of the mesh; of a permute
        its (source, target) pairs.
      trips: how often it runs: the product of the trip counts of the loops around it; None if XLA
        does not know one of them.
      loops: the number of loops around it.
      source: the operation of the traced function that it stems from.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]
    trips: int | None = 1
    loops: int = 0
    source: str = ""

    @property
    def bytes(self) -> int:
        """Of `arrays`, for one run: of a gather the whole, of a reduce-scatter the part."""
        return sum(math.ceil(_bits(dtype) * math.prod(shape) / 8) for dtype, shape in self.arrays)

    @property
    def size(self) -> int:
        """The number of devices in a group."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that each device sends for one run, by the algorithms that send least (rings)."""
        n = self.size
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1,
                 "collective-permute": 1, "collective-broadcast": 1}  # fmt: skip
        return self.bytes * share.get(self.kind, (n - 1) / n)


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program; one in a loop counts once, with its `trips`.

    A collective whose groups are of one device moves nothing and is left out.

    Raises:
      UserError: the text is not that of a compiled program.
    """
    bodies, entry = _computations(text)
    header = dict(re.findall(r"(replica_count|num_partitions)=(\d+)", text[: text.index("\n")]))
    everyone = tuple(range(math.prod(map(int, header.values()))))
    holding: dict[str, bool] = {}

    def holds(name: str) -> bool:
        """Whether a computation, or one that it calls, has a collective."""
        if name not in holding:
            holding[name] = False
            holding[name] = any(
                _parsed(line) or any(map(holds, _called(line))) for line in bodies.get(name, ())
            )
        return holding[name]

    def walk(name: str, loops: int, trips: int | None) -> Iterator[Collective]:
        for line in bodies.get(name, ()):
            if found := _parsed(line):
                groups = found.groups or (everyone,)
                yield dataclasses.replace(found, groups=groups, loops=loops, trips=trips)
            inner = [called for called in _called(line) if holds(called)]
            loop = re.search(r"\swhile\(", line) is not None
            known = _TRIPS.search(line)
            times = None if trips is None or not known else trips * int(known[1])
            for called in inner:
                yield from walk(called, loops + loop, times if loop else trips)

    return [found for found in walk(entry, 0, 1) if found.size > 1]


def counts(found: Iterable[Collective]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(Counter(c.kind for c in found))


def largest(found: Iterable[Collective], kind: str) -> int:
    """The bytes of the largest single array that a collective of that kind leaves; 0 if none."""
    sizes = [dataclasses.replace(c, arrays=(a,)).bytes for c in found if c.kind == kind
             for a in c.arrays]  # fmt: skip
    return max(sizes, default=0)


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLS = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines by computation, the entry's name)."""
    bodies: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        elif " = " in line:
            lines.append(line)
    if entry is None:
        raise UserError("collectives: no ENTRY in the text; give compiled.as_text().")
    return bodies, entry


def _called(line: str) -> list[str]:
    """The computations that an instruction calls."""
    if " async-done(" in line or " async-update(" in line:  # their start has called it
        return []
    found = []
    for one, several in _CALLS.findall(line):
        found += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return found


def _parsed(line: str) -> Collective | None:
    """The collective of an instruction, if it is one."""
    match = _LINE.search(line)
    if not match:
        return None
    result, kind, start = match.groups()
    arrays = tuple(
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _ARRAY.findall(result)
    )
    if start and kind in ("collective-permute", "collective-broadcast"):
        arrays = arrays[1:2]  # (operand, result, and what the backend needs to wait)
    elif start and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    source = _SOURCE.search(line)
    return Collective(kind, arrays, _groups(line), source=source[1] if source else "")


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices in any of XLA's notations; none for one group of all."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", line):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        return _listed(listed[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        shape = _numbers(found[1])
        ids = _iota(found[2])
        return tuple(zip(*[iter(ids)] * shape[-1], strict=True))
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", line
    )
    if not found:
        return ()
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = _iota(found[2]) if found[2] else list(range(math.prod(axes.values())))
    return _along(ids, axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]))


def _along(
    ids: list[int], axes: dict[str, int], wanted: list[tuple[str, str, str]]
) -> tuple[tuple[int, ...], ...]:
    """The groups that vary along some axes (or parts (before, size) of axes) of a mesh of ids."""
    cut: list[tuple[int, bool]] = []  # sizes of the mesh's axes, cut where a part begins or ends
    for name, size in axes.items():
        parts = [(b, n) for wanted_name, b, n in wanted if wanted_name == name]
        if not parts or not parts[0][1]:
            cut.append((size, bool(parts)))
            continue
        before, length = int(parts[0][0]), int(parts[0][1])
        cut += [(before, False), (length, True), (size // before // length, False)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, device in enumerate(ids):
        rest, fixed = place, []
        for size, varies in reversed(cut):
            rest, index = divmod(rest, size)
            if not varies:
                fixed.append(index)
        groups.setdefault(tuple(fixed), []).append(device)
    return tuple(map(tuple, groups.values()))


def _iota(text: str) -> list[int]:
    """`[2,4]T(1,0)`: 0, 1, ... in that shape, transposed, in row-major order."""
    shape = _numbers(re.search(r"\[([\d,]+)\]", text)[1])
    order = re.search(r"T\(([\d,]+)\)", text)
    order = _numbers(order[1]) if order else tuple(range(len(shape)))
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    ids = [0]
    for d in order:
        ids = [start + i * strides[d] for start in ids for i in range(shape[d])]
    return ids


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _bits(dtype: str) -> int:
    """The width of XLA's type of that name: s4 is 4, f8e4m3fn 8, c64 64."""
    if dtype in ("pred", "token"):
        return 8 if dtype == "pred" else 0
    return int(re.match(r"[a-z]+(\d+)", dtype)[1])
