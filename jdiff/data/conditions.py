"""Further arrays of the data that a network is told: embeddings of texts, and their masks.

config.data.conditions names them, and config.data.null what stands for no condition:

    "zero"     0 for a float; a bool (a mask of the places that hold something) is kept
    "empty"    what the text encoder makes of "", its mask and its pooled vector too, as `jdiff
               encode` kept it beside the data
    "learned"  parameters of the network, with a mask that shows them all
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

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


#: What config.data.null can be.
NULLS = ("zero", "empty", "learned")


def null(fields: Sequence[Field], kind: str = "zero") -> dict[str, float | bool]:
    """The null condition of those that have one.

    Of "empty" and "learned" the values are only places for the arrays that `Experiment.nulls` puts
    there; the mask of a learned one is True.

    Raises:
      UserError: an unknown kind.
    """
    if choose("config.data.null", kind, NULLS) == "zero":
        return {field.name: 0.0 for field in fields if field.dtype != "bool"}
    return {field.name: True if field.dtype == "bool" else 0.0 for field in fields}


def empty(data: Any) -> dict[str, np.ndarray]:
    """What became of "" in the set that `data` (a config's section) names; nothing if unknown."""
    from jdiff.data import encoded, folders

    try:
        return encoded.read_empty(folders.open_builder(data.name, data.data_dir).data_path)
    except UserError:  # of a run whose data are not here: it has its own copy
        return {}


def groups(rates: float | Mapping[str, float], names: Sequence[str]) -> Any:
    """config.loss.null_rate as `conditioning.drop` takes it.

    Args:
      rates: a number; or one for each condition. `x_mask` goes with `x`, and `pooled` with `text`
        unless it has a rate of its own.
      names: of the entries that have a null.

    Raises:
      UserError: a rate of something else, a condition without one, or one outside [0, 1].
    """
    if not isinstance(rates, Mapping):
        return _share("config.loss.null_rate", rates)
    for name, rate in rates.items():
        choose("config.loss.null_rate: condition", name, names)
        _share(f"config.loss.null_rate.{name}", rate)
    found: dict[str, list[str]] = {name: [] for name in sorted(rates)}
    for name in names:
        behind = "text" if name == "pooled" else name.removesuffix("_mask")
        leader = name if name in found else behind
        if leader not in found:
            raise UserError(
                f"config.loss.null_rate has no rate for {name!r}; give 0 to keep it always."
            )
        found[leader].append(name)
    return {tuple(group): float(rates[leader]) for leader, group in found.items()}


def _share(what: str, rate: Any) -> Any:
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise UserError(f"{what}={rate!r} given; it is a share, from 0 to 1.")
    return rate


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
