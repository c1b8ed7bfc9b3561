"""Safetensors on disk: tensors as views of files that are read where they are touched.

A safetensors file is eight bytes with the header's length, a JSON header that gives every tensor a
dtype, a shape and a range of bytes, and then the bytes. Tensors are opened as memory maps, so a
checkpoint costs no memory until a leaf of it is copied, and a device that holds one slice of a
tensor reads that slice. Nothing here unpickles.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jdiff import jsonfile
from jdiff.errors import UserError, choose

#: The names of safetensors for the dtypes of numpy.
DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
#: What each library calls a component's weights.
STEMS: Mapping[str, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as read-only views that are read when touched.

    Raises:
      UserError: not a safetensors file, or one that is cut off, damaged, or a pointer of git-lfs.
    """
    path = pathlib.Path(path)
    if path.suffix in _PICKLES:
        raise UserError(
            f"{path} may hold a pickle, which runs code when it is read; only .safetensors files "
            "are read (diffusers' save_pretrained writes them)."
        )
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        jsonfile.refuse_pointer(path, file.read(len(jsonfile.POINTER)))
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is not a safetensors file, or is cut off: {size} bytes.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} is not a safetensors file: its header is no JSON.") from error
    header.pop("__metadata__", None)
    if not header:
        return {}
    # A plain array over the map, so that a slice does not carry memmap's bookkeeping.
    data = np.asarray(np.memmap(path, np.uint8, "r"))[8 + length :]
    return {name: _view(path, name, entry, data) for name, entry in header.items()}


def _view(path: pathlib.Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    dtype = DTYPES[choose(f"{path}: dtype of {name!r}", entry["dtype"], DTYPES)]
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    wanted = math.prod(shape) * dtype.itemsize
    if not 0 <= start <= end <= len(data) or end - start != wanted:
        raise UserError(
            f"{path}: tensor {name!r} {list(shape)} needs {wanted} bytes; the header says "
            f"{start} to {end} of {len(data)}. The file is cut off or damaged."
        )
    return data[start:end].view(dtype).reshape(shape)


def component(folder: str | pathlib.Path, variant: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a component's folder in the diffusers layout: one file, or shards.

    Args:
      variant: "fp16" or another suffix of the file names; if not given, the plain file, or the only
        variant that there is.

    Raises:
      UserError: no weights, several variants and none named, a missing shard, only pickles.
    """
    folder = pathlib.Path(folder)
    found = variants(folder)
    if variant is None and "" not in found and len(found) == 1:
        (variant,) = found
    if (variant or "") not in found:
        there = sorted(v or "(none)" for v in found)
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in _PICKLES]
        raise UserError(
            f"{folder}: no safetensors weights of variant={variant!r}; there are "
            f"{there or 'none'}{f', and {pickles}, which are not read' if pickles else ''}."
        )
    first = found[variant or ""]
    if first.suffix != ".json":
        return tensors(first)
    shards = jsonfile.read(first).get("weight_map", {})
    files = {name: folder / name for name in sorted(set(shards.values()))}
    if absent := [name for name, path in files.items() if not path.is_file()]:
        raise UserError(f"{first} names shards that are not there: {', '.join(absent)}.")
    opened = {name: tensors(path) for name, path in files.items()}
    if lacking := [key for key, name in shards.items() if key not in opened[name]]:
        raise UserError(f"{first} places tensors where they are not: {', '.join(lacking[:8])}.")
    return {key: opened[name][key] for key, name in shards.items()}


def variants(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """What weights a folder has: {"" or "fp16" or ...: the file, or the index of the shards}."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if "-of-" not in path.name:
            stem, _, variant = path.name.removesuffix(".safetensors").partition(".")
            if stem in STEMS.values():
                found[variant] = path
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        variant = path.name.split(".index", 1)[1].removesuffix(".json").removeprefix(".")
        found[variant] = path
    return found


def write(
    folder: str | pathlib.Path,
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Any,
    *,
    variant: str | None = None,
    shard_bytes: int = 10 * 10**9,
    library: str = "diffusers",
) -> None:
    """Writes a component's weights as diffusers and transformers do: one file, or shards, an index.

    One leaf is in memory at a time.

    Args:
      arrays: the shape and dtype of every tensor by name.
      read: `read(name) -> array`, called once for each, in order.
      variant: put in the file names, e.g. "fp16".
      shard_bytes: the most that a file holds, unless one tensor is larger.
      library: in `STEMS`, whose file names they get.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {k: math.prod(shape) * np.dtype(dtype).itemsize for k, (shape, dtype) in arrays.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    stem, suffix = STEMS[library], f".{variant}" if variant else ""
    for path in variants(folder).values():  # of an earlier save: it would be read instead
        path.unlink()
    if len(shards) == 1:
        _write(folder / f"{stem}{suffix}.safetensors", arrays, shards[0], read)
        return
    # They put the variant before the number of a shard, and after "index".
    files = [
        f"{stem}{suffix}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for file, names in zip(files, shards):
        _write(folder / file, arrays, names, read)
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in zip(files, shards) for name in names},
    }
    path = folder / f"{stem}.safetensors.index{suffix}.json"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write(path: pathlib.Path, arrays: Mapping, names: Iterable[str], read: Any) -> None:
    """One file: the header, then every tensor; renamed into place when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to be told
    end = 0
    for name in names:
        shape, dtype = arrays[name]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(read(name))
            file.write(array.reshape(-1).view(np.uint8).data)
    partial.replace(path)
