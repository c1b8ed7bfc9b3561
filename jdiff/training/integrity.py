"""Checksums of the files of a folder: written when it is complete, compared before it is used.

CRC-32 finds every flipped bit and every damaged run of up to 32 bits, and all other damage but for
one case in 2^32. It guards against disks, networks and half copies, not against malice.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

FILE = "checksums.json"
#: Bytes under one checksum: what one thread, or one process, reads at a time.
PIECE = 2**26
_BUFFER = 2**22


def write(folder: pathlib.Path, without: Iterable[str] = ()) -> None:
    """Writes `folder`/checksums.json, synced to disk: path -> [bytes, CRC-32 of every `PIECE`].

    Args:
      without: paths, relative to the folder, that are not yet what they will be.
    """
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    names = sorted(set(names) - {*without, FILE})
    sums: dict[str, list[int]] = {name: [(folder / name).stat().st_size] for name in names}
    pieces = [(name, at) for name in names for at in range(0, sums[name][0], PIECE)]
    for (name, _), crc in zip(pieces, _pool(lambda p: _sum(folder / p[0], p[1])[1], pieces)):
        sums[name].append(crc)
    with (folder / FILE).open("w") as file:
        json.dump({"piece": PIECE, "crc32": sums, "own": _own(sums)}, file)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: pathlib.Path, part: int = 0, parts: int = 1) -> list[str] | None:
    """What is wrong with the files of `folder`: empty if all are as written, None if not known.

    Args:
      part, parts: compares every parts-th piece only, from `part` on, so that many processes can
        share the reading.
    """
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return None  # written by a version without checksums
    except OSError as error:
        return [f"{FILE} cannot be read ({error.strerror})"]
    try:
        written = json.loads(text)
        piece = int(written["piece"])
        sums = {
            str(n): (int(s), [int(c) for c in crcs]) for n, (s, *crcs) in written["crc32"].items()
        }
        pieces = [(name, i, crc) for name, (_, crcs) in sums.items() for i, crc in enumerate(crcs)]
        if written["own"] != _own(written["crc32"]) or piece < 1:
            raise ValueError
        if any(len(crcs) != -(-size // piece) for size, crcs in sums.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{FILE} is not what was written"]
    wrong = list(filter(None, (_missing(folder, name, size) for name, (size, _) in sums.items())))
    if wrong:
        return wrong

    def compare(entry: tuple[str, int, int]) -> str:
        name, i, crc = entry
        try:
            same = _sum(folder / name, i * piece, piece)[1] == crc
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return "" if same else f"{name} holds other bytes than were written"

    return list(filter(None, _pool(compare, pieces[part::parts])))


def _own(sums: dict[str, list[int]]) -> int:
    """The checksum of the checksums."""
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def _missing(folder: pathlib.Path, name: str, size: int) -> str:
    try:
        there = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    return "" if there == size else f"{name} has {there:,} of {size:,} bytes"


def _sum(path: pathlib.Path, at: int, piece: int = PIECE) -> tuple[int, int]:
    """(bytes, CRC-32) of a piece."""
    size = crc = 0
    buffer = memoryview(bytearray(min(_BUFFER, piece)))
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while size < piece and (n := file.readinto(buffer[: piece - size])):
            size, crc = size + n, zlib.crc32(buffer[:n], crc)
    return size, crc


def _pool(function: Callable[[Any], Any], entries: list[Any]) -> list[Any]:
    """Reading and CRC-32 both let other threads run."""
    workers = max(1, min(len(entries), os.cpu_count() or 1, 16))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, entries))
