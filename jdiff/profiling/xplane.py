"""Reads .xplane.pb, the profiler's own file: every event of host and devices, and the programs.

`jax.profiler.ProfileData` reads it too, but leaves out what a kind of event has in common (on TPUs:
which operation it is) and the compiled programs, and needs the jaxlib that may not be where a trace
is looked at. The format is a protocol buffer (OpenXLA, tsl/profiler/protobuf/xplane.proto), whose
wire format is tags, lengths and numbers; parts that are not asked for are skipped whole.
"""

import dataclasses
import functools
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jdiff.errors import UserError


class Frame(NamedTuple):
    """A place in the Python that a program was traced from."""

    function: str
    file: str
    line: int


class Operation(NamedTuple):
    """An instruction of a compiled program: its opcode, and where it comes from."""

    opcode: str
    op_name: str  # jax's name of it, "jit(step)/jvp()/dot_general", or ""
    stack: tuple[Frame, ...]  # the innermost first, or ()


class Program(NamedTuple):
    """A compiled program: the name of its module, "jit_step", and its instructions by name."""

    module: str
    operations: dict[str, Operation]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that took time, on one line of a plane; times in nanoseconds of the trace."""

    name: str
    start: float
    end: float
    _stats: tuple[memoryview, ...]
    _plane: "Plane"
    _kind: int

    @property
    def stats(self) -> dict[str, Any]:
        """Its facts by name, over those of its kind."""
        return self._plane._kinds[self._kind].stats | self._plane._read(self._stats)


@dataclasses.dataclass
class Line:
    """A thread, a stream of a GPU, or one of a TPU's tracks."""

    name: str
    _plane: "Plane"
    _start: int  # nanoseconds
    _raw: list[memoryview]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    @functools.cached_property
    def events(self) -> list[Event]:
        """Its events in the order of the file; their facts are read when asked for."""
        return [self._event(raw) for raw in self._raw]

    def _event(self, raw: memoryview) -> Event:
        kind = offset = length = 0
        stats = []
        for field, value in _fields(raw):
            if field == 1:
                kind = value
            elif field == 2:
                offset = _signed(value)
            elif field == 3:
                length = _signed(value)
            elif field == 4:
                stats.append(value)
        start = self._start + offset / 1000
        name = self._plane._kinds[kind].name
        return Event(name, start, start + length / 1000, tuple(stats), self._plane, kind)


class _Kind(NamedTuple):
    """What events of one kind have in common."""

    name: str
    stats: dict[str, Any]


class Plane:
    """A device, or the host: `name`, `lines`, and `programs` where the compiler left them.

    Attributes:
        programs: id of a program -> `Program`.
    """

    def __init__(self, raw: memoryview):
        self.name = ""
        lines, kinds, names = [], [], []
        for field, value in _fields(raw):
            if field == 2:
                self.name = _text(value)
            elif field == 3:
                lines.append(value)
            elif field == 4:
                kinds.append(dict(_fields(value)))
            elif field == 5:
                names.append(dict(_fields(value)))
        self._names = {_id(n): _text(dict(_fields(n[2])).get(2, b"")) for n in names if 2 in n}
        self._kinds, self.programs = {}, {}
        for kind in kinds:
            if 2 in kind:
                self._add_kind(_id(kind), list(_fields(kind[2])))
        self.lines = [self._line(line) for line in lines]

    def _add_kind(self, number: int, fields: list[tuple[int, Any]]) -> None:
        name = _text(dict(fields).get(2, b""))
        stats = self._read(tuple(value for field, value in fields if field == 5))
        if isinstance(program := stats.pop("Hlo Proto", None), bytes | memoryview):
            found = Program(name.rsplit("(", 1)[0], _operations(memoryview(program)))
            self.programs[stats.get("program_id", number)] = found
        self._kinds[number] = _Kind(name, stats)

    def _line(self, raw: memoryview) -> Line:
        name, start, events = "", 0, []
        for field, value in _fields(raw):
            if field == 2:
                name = _text(value)
            elif field == 3:
                start = _signed(value)
            elif field == 4:
                events.append(value)
        return Line(name, self, start, events)

    def _read(self, stats: tuple[memoryview, ...]) -> dict[str, Any]:
        out = {}
        for raw in stats:
            name, found = "", None
            for field, value in _fields(raw):
                if field == 1:
                    name = self._names.get(value, "")
                elif field == 2:
                    found = struct.unpack("<d", value)[0]
                elif field == 3:
                    found = value
                elif field == 4:
                    found = _signed(value)
                elif field == 5:
                    found = _text(value)
                elif field == 6:
                    found = value
                elif field == 7:  # a text that many stats share
                    found = self._names.get(value, "")
            out[name] = found
        return out


def read(path: str | pathlib.Path) -> list[Plane]:
    """The planes of a trace.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = pathlib.Path(path)
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged, or not a trace of the profiler.") from error


def parse(data: bytes) -> list[Plane]:
    """The planes of a serialised XSpace."""
    return [Plane(value) for field, value in _fields(memoryview(data)) if field == 1]


def newest(folder: str | pathlib.Path) -> pathlib.Path | None:
    """The newest trace below a folder that the profiler was given, or None."""
    found = pathlib.Path(folder).glob("plugins/profile/*/*.xplane.pb")
    return max(found, key=lambda path: (path.parent.name, path.name), default=None)


def _operations(program: memoryview) -> dict[str, Operation]:
    """The instructions of an HloProto (OpenXLA, xla/service/hlo.proto)."""
    out = {}
    for module in _all(program, 1):
        stack = _stacks(module)
        for computation in _all(module, 3):
            for instruction in _all(computation, 2):
                parts = dict(_fields(instruction))
                source = dict(_fields(parts[7])) if 7 in parts else {}
                out[_text(parts.get(1, b""))] = Operation(
                    _text(parts.get(2, b"")), _text(source.get(2, b"")), stack(source.get(15, 0))
                )
    return out


def _stacks(module: memoryview, most: int = 2) -> Callable[[int], tuple[Frame, ...]]:
    """The number of a frame -> the frame and its callers, from the module's StackFrameIndex."""
    tables: dict[int, list] = {1: [], 2: [], 3: [], 4: []}  # files, functions, places, frames
    for index in (value for value in _all(module, 17) if not isinstance(value, int)):
        for field, value in _fields(index):
            tables.get(field, []).append(value)
    files, functions, places, frames = tables.values()

    @functools.cache
    def stack(number: int) -> tuple[Frame, ...]:
        out = []
        while 0 < number <= len(frames) and len(out) < most:
            frame = dict(_fields(frames[number - 1]))
            place = dict(_fields(places[frame[1] - 1]))
            file, function = _text(files[place[1] - 1]), _text(functions[place[2] - 1])
            out.append(Frame(function, file, place.get(3, 0)))
            number = frame.get(2, 0)
        return tuple(out)

    return stack


def _all(raw: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for field, value in _fields(raw) if field == wanted)


def _fields(raw: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a message: an int, or the bytes of anything longer.

    Raises:
        ValueError: the message is cut off or of another format.
    """
    at, end = 0, len(raw)
    while at < end:
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(raw, at)
        else:
            if kind == 2:
                length, at = _varint(raw, at)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            if at + length > end:
                raise ValueError("cut off")
            value, at = raw[at : at + length], at + length
        yield tag >> 3, value


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _text(value: Any) -> str:
    return bytes(value).decode("utf-8", "replace")


def _id(entry: dict[int, Any]) -> int:
    """The key of a map's entry; the default 0 is not written."""
    return entry.get(1, 0)
