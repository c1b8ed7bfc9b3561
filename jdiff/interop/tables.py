"""Which tensor of a checkpoint is which of ours: one declarative table a family.

A table is a tuple of rules, each for a module (or a single leaf) and all its numbered siblings:

    Rule("blocks/{i}/q", "transformer_blocks.{i}.attn.to_q", linear)
    Rule("blocks/{i}/qkv", ("blocks.{i}.to_q", "blocks.{i}.to_k", "blocks.{i}.to_v"), linears(1))
    Rule("label", "y_embedder.embedding_table.weight", leaf)

The same table is read in both directions. Where our blocks are stacked for a scan, "{i}/" is absent
from our path and the leaf's first axis runs over i.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdiff.errors import UserError
from jdiff.models.functional import flatten

# Of a transposed copy at a time: wider ones leave the cache, narrower ones are all overhead.
_COLUMNS = 64
View = Callable[[np.ndarray], np.ndarray]


class Move(NamedTuple):
    """A tensor of theirs as ours and back: views (transposes, reshapes), no arithmetic.

    `shape` is theirs, from ours; they agree on the number of elements.
    """

    ours: View
    theirs: View


def _same(a: np.ndarray) -> np.ndarray:
    return a


same = Move(_same, _same)
transposed = Move(lambda a: a.T, lambda a: a.T)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """How a module's leaves correspond: {our leaf: (their leaf, move)}; "" is the path itself.

    Several of theirs in one of ours are joined along `axis` of ours.
    """

    leaves: Mapping[str, tuple[str, Move]]
    axis: int = -1


linear = Kind({"kernel": ("weight", transposed), "bias": ("bias", same)})
conv = Kind(
    {
        "kernel": (
            "weight",
            Move(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
        ),
        "bias": ("bias", same),
    }
)
norm = Kind({"scale": ("weight", same), "bias": ("bias", same)})
leaf = Kind({"": ("", same)})
"""A parameter by itself: both sides of the rule are whole names."""
conv_linear = Kind(
    {
        "kernel": (
            "weight",
            Move(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
        ),
        "bias": ("bias", same),
    }
)
"""A 1 x 1 convolution of theirs that is a `Linear` of ours."""


@functools.cache
def linears(count: int) -> Kind:
    """`count` maps in one tensor of theirs, [n out, in], that are one `Linear` [in, n, out]."""
    kernel = Move(lambda a: a.T.reshape(a.shape[1], count, -1), lambda a: a.reshape(len(a), -1).T)
    bias = Move(lambda a: a.reshape(count, -1), lambda a: a.reshape(-1))
    return Kind({"kernel": ("weight", kernel), "bias": ("bias", bias)}, axis=-2)


@functools.cache
def patch(size: int) -> Kind:
    """A convolution over patches `[O, C, p, p]` that is a `Linear` on our (row, column, C)."""

    def ours(a: np.ndarray) -> np.ndarray:
        return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

    def theirs(a: np.ndarray) -> np.ndarray:
        return a.reshape(size, size, -1, a.shape[-1]).transpose(3, 2, 0, 1)

    return Kind({"kernel": ("weight", Move(ours, theirs)), "bias": ("bias", same)})


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our module `ours` holds what `theirs` hold; several are joined along the kind's axis.

    `first` is the number that theirs begin with where ours begin with 0.
    """

    ours: str
    theirs: str | tuple[str, ...]
    kind: Kind
    first: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One class of networks in checkpoints.

    Attributes:
      cls: the class that config.json names (`_class_name`, or in `architectures`), or a name of our
        own for a layout without a config.
      build: config -> (our model's class, its fields). Raises a UserError for what it cannot serve.
      config: fields -> their config, so that build(config(fields)) gives the fields again.
      table: the rules; or (fields) -> the rules, where their numbers depend on the fields.
      ignored: tensors of theirs that we compute, as regular expressions of whole names.
      renamed: names of other files, as (regular expression, today's), as for `re.sub`; a file is
        written back with the names that it had.
      also: other classes whose files hold this network among what is ignored.
      library: whose layout a folder of it has, "diffusers" or "transformers": they differ in the
        names of the weights' files, and in how the config names the class.
    """

    cls: str
    build: Callable[[Mapping[str, Any]], tuple[type, dict[str, Any]]]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    table: tuple[Rule, ...] | Callable[[Mapping[str, Any]], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    also: tuple[str, ...] = ()
    library: str = "diffusers"


class Entry(NamedTuple):
    """Where a leaf of ours comes from."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    keys: tuple[tuple[str, ...], ...]  # a tuple of parts a layer; one layer if not stacked
    stacked: bool
    move: Move
    axis: int = -1


def plan(
    shapes: Mapping[str, Any], family: Family, fields: Mapping[str, Any] | None = None
) -> list[Entry]:
    """An entry for every leaf of a tree of shapes, of a network with these fields.

    Raises:
      UserError: leaves that no rule of the table names.
    """
    rules = family.table(fields or {}) if callable(family.table) else family.table
    templates = _by_outline(rules)
    entries, orphans = [], []
    for path, shape in flatten(shapes):
        entry = _entry(path, tuple(shape.shape), templates)
        entries.append(entry) if entry else orphans.append("/".join(path))
    if orphans:
        raise UserError(f"{family.cls}: no rule of the table names {listed(orphans)}.")
    return entries


class _Template(NamedTuple):
    """One leaf of a rule, with the placeholder that a stack's axis replaces, or none."""

    pattern: re.Pattern
    rule: Rule
    theirs: str
    move: Move
    stacked_over: str | None


_NUMBER = re.compile(r"\{\w\}|\d+")


def _by_outline(rules: Iterable[Rule]) -> dict[str, list[_Template]]:
    """The rules' leaves, in order, by what their paths look like without numbers."""
    found: dict[str, list[_Template]] = {}
    for rule in rules:
        for ours, (theirs, move) in rule.kind.leaves.items():
            for stacked_over in (None, *re.findall(r"\{(\w)\}", rule.ours)):
                path = "/".join(filter(None, (rule.ours, ours)))
                if stacked_over is not None:
                    path = path.replace(f"{{{stacked_over}}}/", "")
                template = _Template(_pattern(path), rule, theirs, move, stacked_over)
                found.setdefault(_NUMBER.sub("#", path), []).append(template)
    return found


def _entry(
    path: tuple[str, ...], shape: tuple[int, ...], templates: Mapping[str, list[_Template]]
) -> Entry | None:
    name = "/".join(path)
    for pattern, rule, theirs, move, stacked_over in templates.get(_NUMBER.sub("#", name), ()):
        found = pattern.fullmatch(name)
        if not found:
            continue
        numbers = {name: int(n) + rule.first for name, n in found.groupdict().items()}
        depth = 0 if stacked_over is None else shape[0]
        layers = [{stacked_over: n + rule.first} for n in range(depth)] or [{}]
        parts = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        keys = tuple(
            tuple(".".join(filter(None, (part.format(**numbers, **n), theirs))) for part in parts)
            for n in layers
        )
        return Entry(path, shape, keys, stacked_over is not None, move, rule.kind.axis)
    return None


@functools.lru_cache(maxsize=4096)
def _pattern(path: str) -> re.Pattern:
    """Matches our paths; a placeholder that comes twice is one number."""
    parts = re.split(r"\{(\w)\}", path)
    seen: set[str] = set()
    out = re.escape(parts[0])
    for name, rest in zip(parts[1::2], parts[2::2]):
        out += f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)"
        out += re.escape(rest)
        seen.add(name)
    return re.compile(out)


def today(given: Iterable[str], family: Family) -> dict[str, str]:
    """The names that the table knows a checkpoint's tensors by: {that name: the file's}.

    Where a tensor is there under both, the table's name is the one that is read.
    """
    named, given = {}, dict.fromkeys(given)
    for key in given:
        name = key
        for old, new in family.renamed:
            name = re.sub(old, new, name)
        named[key if name in given else name] = key
    return named


def check(
    entries: Sequence[Entry], given: Mapping[str, np.ndarray], ignored: Sequence[str], where: str
) -> None:
    """Refuses a checkpoint that is not this network.

    Raises:
      UserError: missing, extra or misshapen tensors, by name.
    """
    wanted = {key for entry in entries for layer in entry.keys for key in layer}
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    missing = sorted(wanted - given.keys())
    extra = sorted(key for key in given.keys() - wanted if not skip.fullmatch(key))
    bent = []
    for entry in entries:
        for layer in entry.keys:
            if not all(key in given for key in layer):
                continue
            views = [entry.move.ours(hollow(given[key].shape)) for key in layer]
            shape = _joined_shape(views, entry.axis)
            if shape != entry.shape[entry.stacked :]:
                found = ", ".join(f"{key} {list(given[key].shape)}" for key in layer)
                bent.append(f"{found} for {'/'.join(entry.path)} {list(entry.shape)}")
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (("missing", missing), ("not part of it", extra), ("misshapen", bent))
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit its config: " + "; ".join(problems) + ".")


def hollow(shape: tuple[int, ...]) -> np.ndarray:
    """An array of that shape that takes no memory, to send through a move."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)


def _joined_shape(parts: Sequence[np.ndarray], axis: int) -> tuple[int, ...] | None:
    others = {tuple(np.delete(part.shape, axis)) for part in parts if part.ndim}
    if len(others) > 1:
        return None
    shape = list(parts[0].shape)
    if shape:
        shape[axis] = sum(part.shape[axis] for part in parts)
    return tuple(shape)


def fill(entry: Entry, given: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    """Reads a leaf of ours from the checkpoint's views into `out`."""
    for n, layer in enumerate(entry.keys):
        target, start = (out[n] if entry.stacked else out), 0
        for key in layer:
            view = entry.move.ours(given[key])
            stop = start + (view.shape[entry.axis] if view.ndim else 0)
            there = (..., slice(start, stop), *(slice(None),) * (-1 - entry.axis))
            _copy(view, target[there] if view.ndim else target)
            start = stop


def empty(leaves: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """Uninitialised arrays of these shapes and dtypes in one piece of memory.

    The kernel hands out a large piece in large pages, several times faster, and each array begins
    where jax's CPU devices take it as it is: others they copy.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in leaves]
    starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)])
    buffer = np.empty(starts[-1] + 64, np.uint8)
    starts -= buffer.ctypes.data % -64
    return [
        buffer[start : start + size].view(dtype).reshape(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, leaves)
    ]


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Assigns, by blocks of columns where the source is transposed: 2 to 6 times faster."""
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, source.shape[-1], _COLUMNS):
        target[..., start : start + _COLUMNS] = source[..., start : start + _COLUMNS]


def split(entry: Entry, value: np.ndarray) -> dict[str, np.ndarray]:
    """Their tensors, as views, of a leaf of ours."""
    found = {}
    for n, layer in enumerate(entry.keys):
        mine = value[n] if entry.stacked else value
        # Parts of one leaf are alike: q, k and v, or a scale and a shift.
        parts = np.split(mine, len(layer), axis=entry.axis) if len(layer) > 1 else [mine]
        found.update(zip(layer, (entry.move.theirs(part) for part in parts)))
    return found


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more
