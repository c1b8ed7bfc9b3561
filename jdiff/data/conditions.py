"""Further arrays of the data that a network is told: embeddings of texts, and their masks.

config.data.conditions names them. The null of a float, for classifier-free guidance, is 0; a bool
(a mask of the places that hold something) has none, and is kept.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from jdiff.data.sources import Field, Info
from jdiff.errors import UserError, choose


def named(names: Sequence[str], info: Info) -> tuple[Field, ...]:
    """The fields of the data that config.data.conditions names.

    Raises:
      UserError: the data were read without one of them, or it holds no floats or bools.
    """
    known = {field.name: field for field in info.fields}
    for name in names:
        if name not in known:
            raise UserError(
                f"config.data.conditions={tuple(names)}: {name!r} of {info.name} is no array of "
                f"floats or bools; those that are: {', '.join(known) or 'none'}."
            )
    return tuple(known[name] for name in names)


def null(fields: Sequence[Field]) -> dict[str, float]:
    """The null condition of those that have one."""
    return {field.name: 0.0 for field in fields if field.dtype != "bool"}


def read(path: str | pathlib.Path, fields: Sequence[Field]) -> dict[str, np.ndarray]:
    """The arrays `[N, ...]` of an .npz file, one for each field, floats as float32.

    Raises:
      UserError: the file cannot be read, or its arrays do not fit (see `fitted`).
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz file: {error}") from error
    return fitted(str(path), arrays, fields)


def fitted(
    where: str, arrays: Mapping[str, np.ndarray], fields: Sequence[Field], num: int | None = None
) -> dict[str, np.ndarray]:
    """`arrays`, if there is one `[num, ...]` for each field; floats as float32.

    Args:
      where: what to call them in an error.
      num: as many as they agree on unless given.

    Raises:
      UserError: one is missing, unknown, or of another shape or kind.
    """
    names = [field.name for field in fields]
    for name in arrays:
        choose(f"{where}: the array", name, names)
    found = {}
    for field in fields:
        wanted = f"[{', '.join(map(str, ('N' if num is None else num, *field.shape)))}]"
        if field.name not in arrays:
            raise UserError(f"{where}: there is no array {field.name!r} {wanted}.")
        array = np.asarray(arrays[field.name])
        if array.shape[1:] != field.shape or array.ndim == 0 or num not in (None, len(array)):
            raise UserError(f"{where}: {field.name!r} is {list(array.shape)}, not {wanted}.")
        if array.dtype.kind != np.dtype(field.dtype).kind:
            raise UserError(
                f"{where}: {field.name!r} holds {array.dtype}; the data have {field.dtype}."
            )
        found[field.name] = array if field.dtype == "bool" else array.astype(np.float32)
    if len({len(array) for array in found.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in found.items())
        raise UserError(f"{where}: the arrays differ in length: {lengths}.")
    if found and not len(next(iter(found.values()))):
        raise UserError(f"{where}: the arrays are empty.")
    return found


def in_turn(arrays: Mapping[str, np.ndarray], num: int) -> dict[str, np.ndarray]:
    """`num` conditions: the rows given in turn, so that each occurs as often."""
    return {name: array[np.arange(num) % len(array)] for name, array in arrays.items()}
