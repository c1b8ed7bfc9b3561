"""Points of a sweep: overrides of a config, made as products, checked, named by what differs."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jdiff import config as configs
from jdiff.errors import UserError

#: {"optimizer.learning_rate": 1e-3, "seed": 1}: names of fields, without "config.".
Overrides = dict[str, Any]

# How long fields are called in the names of folders, and how long such a name may get.
_SHORT = {"learning_rate": "lr", "batch_size": "batch"}
_LONGEST = 100


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder, such as 03_lr=0.001_seed=1; it stays when points are added.
      overrides: what it changes in the config of the file.
      config: the whole of its config.
    """

    name: str
    overrides: Overrides
    config: ConfigDict


def product(*parts: Mapping[str, Iterable[Any]] | Iterable[Overrides]) -> list[Overrides]:
    """Every combination: of the values of each field, and of the parts; the last varies fastest.

    Args:
      parts: {field: values}, or points (as `zipped` and `product` give them).

    Raises:
      UserError: values that are no list, an empty list, or a field that two parts give.

    >>> product({"optimizer.learning_rate": (1e-3, 2e-3), "seed": range(3)})    # 6 points
    >>> product(zipped({"model.width": (64, 128), "model.heads": (2, 4)}), {"seed": range(3)})
    """
    choices: list[list[Overrides]] = []
    for part in parts:
        if isinstance(part, Mapping):
            choices += [[{name: v} for v in _values("product", name, part[name])] for name in part]
        else:
            choices.append([dict(point) for point in _values("product", "a part", part)])
    points = []
    for chosen in itertools.product(*choices):
        merged: Overrides = {}
        for point in chosen:
            if both := sorted(merged.keys() & point.keys()):
                raise UserError(f"product: {both[0]} is given twice.")
            merged |= point
        points.append(merged)
    return points


def zipped(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """The first values of all fields, then the second, and so on.

    Raises:
      UserError: values that are no list, or lists of different lengths.

    >>> zipped({"model.width": (64, 128), "model.heads": (2, 4)})    # 2 points
    """
    columns = {name: _values("zipped", name, values) for name, values in axes.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"zipped: lists of different lengths: {lengths}.")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def resolve(
    path: str, words: Sequence[str] = (), *, sweep: str = "", known: Mapping[str, Overrides] = {}
) -> list[Point]:
    """The points of a config file's sweep(), each with its whole config, checked without running.

    Args:
      path, words: as `config.load`; the words hold for all points.
      sweep: which, see `config.points`.
      known: names that points got before, with their overrides: they keep them.

    Raises:
      UserError: no point; an unknown field (with the nearest), a value of another type, or names
        and arguments that the parts of the experiment do not take; two points of equal configs.
    """
    configs.load(path, words)  # its own errors, without the name of a point
    given = [
        {name: _plain(value) for name, value in point.items()}
        for point in configs.points(path, sweep)
    ]
    if not given:
        raise UserError(f"{path}: sweep() yields no point.")
    made = [_configured(path, words, i, overrides) for i, overrides in enumerate(given)]
    seen: dict[str, int] = {}
    for i, one in enumerate(made):
        first = seen.setdefault(configs.to_json(one), i)
        if first != i:
            raise UserError(
                f"{path}: points {first} and {i} of sweep() are the same: {describe(given[first])}"
                f" and {describe(given[i])}."
            )
    _check(path, given, made)
    return [Point(*row) for row in zip(names(given, known), given, made)]


def names(points: Sequence[Overrides], known: Mapping[str, Overrides] = {}) -> list[str]:
    """A name for each point: a number, and the fields that are not the same in all points.

    Points that `known` has keep their names; others are numbered after these.
    """
    fields = list(dict.fromkeys(name for point in points for name in point))
    differ = [
        name for name in fields
        if len(points) == 1 or any(point.get(name, ...) != points[0].get(name, ...)
                                   or name not in point for point in points)
    ]  # fmt: skip
    short = _short(differ)
    taken = {key(overrides): name for name, overrides in known.items()}
    number = 1 + max((int(name.partition("_")[0]) for name in known), default=-1)
    digits = max(2, len(str(number + len(points) - 1)))
    found = []
    for point in points:
        if (name := taken.get(key(point))) is None:
            parts = [f"{short[n]}={_written(point[n])}" for n in differ if n in point]
            name = "_".join([f"{number:0{digits}}", *parts])[:_LONGEST].rstrip("-_.")
            number += 1
        found.append(name)
    return found


def key(overrides: Overrides) -> str:
    """Equal for equal overrides, whatever their order, and for lists and tuples."""
    return json.dumps(overrides, sort_keys=True)


def describe(overrides: Overrides) -> str:
    """`optimizer.learning_rate=0.001, seed=1`."""
    return ", ".join(f"{name}={_text(value)}" for name, value in overrides.items()) or "no override"


def words(overrides: Overrides) -> list[str]:
    """The overrides as words of the command line."""
    return [f"--config.{name}={_text(value)}" for name, value in overrides.items()]


def _values(where: str, name: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{where}: {name} takes a list of values, given {values!r}.")
    found = list(values)
    if not found:
        raise UserError(f"{where}: {name} has no values.")
    return found


def _configured(path: str, base: Sequence[str], i: int, overrides: Overrides) -> ConfigDict:
    """The config of a point, whose overridden fields hold exactly what was given."""
    try:
        config = configs.load(path, [*base, *words(overrides)])
    except UserError as error:
        raise UserError(f"{path}: point {i} of sweep(): {error}") from None
    from jdiff import staged

    for name, value in overrides.items():
        held: Any = config
        for part in name.split("."):
            held = held[part]
        held = json.loads(configs.to_json(held)) if isinstance(held, ConfigDict) else held
        if not _same(value, held):
            raise UserError(
                f"{path}: point {i} of sweep(): {name}={value!r} is {type(value).__name__}, and "
                f"would be read as {held!r}; give a value of the field's own type."
            )
    return staged.one(config, "sweep")


def _same(given: Any, held: Any) -> bool:
    """Whether they are equal and of one kind; a whole number is a float too."""
    if isinstance(given, dict) and isinstance(held, dict):
        return given.keys() == held.keys() and all(_same(given[k], held[k]) for k in given)
    if isinstance(given, list | tuple) and isinstance(held, list | tuple):
        return len(given) == len(held) and all(map(_same, given, held))
    kinds = {bool: "bool", int: "number", float: "number", str: "str", type(None): "none"}
    alike = kinds.get(type(given), given) == kinds.get(type(held), held)
    return alike and (given == held or given != given)


def _check(path: str, given: Sequence[Overrides], made: Sequence[ConfigDict]) -> None:
    """Builds each experiment that differs in more than seed and optimiser; nothing is computed."""
    from jdiff import experiment, kinds
    from jdiff.data import sources
    from jdiff.training import optimizers

    infos: dict[str, Any] = {}
    built: set[str] = set()
    for i, (overrides, one) in enumerate(zip(given, made)):
        tree = json.loads(configs.to_json(one))
        data = json.dumps(tree["data"])
        tree = json.dumps({k: v for k, v in tree.items() if k not in ("seed", "optimizer")})
        try:
            optimizers.build(one.optimizer, one.train.steps)
            if data not in infos:
                source = sources.source(
                    one.data.name, one.data.train_split, one.data.data_dir,
                    fields=one.data.conditions,
                )  # fmt: skip
                infos[data] = experiment.prepared(source.info, one.data)
            if tree not in built:
                built.add(tree)
                kind = kinds.of(one)
                kind.check_later(kind.build(one, infos[data]))
        except UserError as error:
            raise UserError(
                f"{path}: point {i} of sweep() ({describe(overrides)}): {error}"
            ) from None


def _plain(value: Any) -> Any:
    """Numbers of NumPy and JAX as Python's; tuples and dicts of these too."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays, and scalars of NumPy
        return value.tolist()
    return value


def _text(value: Any) -> str:
    """A value as `config.load` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "(" + ",".join(map(_text, value)) + ")"
    if isinstance(value, dict):
        return json.dumps(value)
    return value if isinstance(value, str) else repr(value)


def _written(value: Any) -> str:
    """A value as part of a folder's name."""
    text = value if isinstance(value, str) else _text(value).strip("()")
    return re.sub(r"[^A-Za-z0-9.,+-]+", "-", text).strip("-.,") or "none"


def _short(fields: Sequence[str]) -> dict[str, str]:
    """Field -> the last words of its name that no other field has."""
    found = {}
    for field in fields:
        parts = field.split(".")
        for n in range(1, len(parts) + 1):
            end = parts[-n:]
            if sum(other.split(".")[-n:] == end for other in fields) == 1:
                break
        found[field] = ".".join([*end[:-1], _SHORT.get(end[-1], end[-1])])
    return found
