"""Checksums of the files of a folder: written when it is complete, compared before it is used.

CRC-32 finds every flipped bit and every damaged run of up to 32 bits, and all other damage but for
one case in 2^32. It guards against disks, networks and half copies, not against malice.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Iterable

FILE = "checksums.json"
_CHUNK = 2**22


def write(folder: pathlib.Path, without: Iterable[str] = ()) -> None:
    """Writes `folder`/checksums.json: path -> [bytes, CRC-32] of every file below, synced to disk.

    Args:
      without: paths, relative to the folder, that are not yet what they will be.
    """
    names = [name for name in _files(folder) if name not in {*without, FILE}]
    sums = dict(zip(names, _pool(lambda name: _sum(folder / name), names)))
    with (folder / FILE).open("w") as file:
        json.dump({"crc32": sums}, file, indent=0, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: pathlib.Path, part: int = 0, parts: int = 1) -> list[str] | None:
    """What is wrong with the files of `folder`: empty if all are as written, None if not known.

    Args:
      part, parts: checks every parts-th file only, from `part` on, so that many processes can share
        the reading.
    """
    try:
        text = (folder / FILE).read_text()
    except FileNotFoundError:
        return None  # written by a version without checksums
    except (OSError, ValueError) as error:
        return [f"{FILE} cannot be read ({error})"]
    try:
        sums = {
            name: (int(size), int(crc)) for name, (size, crc) in json.loads(text)["crc32"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{FILE} is not what was written"]
    names = sorted(sums)[part::parts]
    found = _pool(lambda name: _compare(folder / name, *sums[name]), names)
    return [f"{name} {what}" for name, what in zip(names, found) if what]


def _compare(path: pathlib.Path, size: int, crc: int) -> str:
    try:
        there = path.stat().st_size
        if there != size:
            return f"has {there:,} of {size:,} bytes"
        return "" if _sum(path)[1] == crc else "holds other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _sum(path: pathlib.Path) -> tuple[int, int]:
    size = crc = 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            size, crc = size + n, zlib.crc32(buffer[:n], crc)
    return size, crc


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _pool(function, names: list[str]) -> list:
    """Reading and CRC-32 both let other threads run."""
    workers = max(1, min(len(names), os.cpu_count() or 1, 16))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, names))
