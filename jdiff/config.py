"""Experiment configs: a Python file with `get_config()`, and overrides given on the command line.

    jdiff train --config=configs/digits.py --config.train.batch_size=64 --config.seed 1

What `load` returns is locked, typed, and equal to what `from_json(to_json(config))` gives, so that
the config.json of a run directory is the config of the run.
"""

import ast
import difflib
import fnmatch
import importlib.util
import json
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from jdiff.errors import UserError

#: Sections that hold the arguments of what their name chooses. Overrides may add fields to them;
#: `experiment.build` checks those against what the chosen function takes.
OPEN = (
    "config.model", "config.schedule", "config.loss.arguments", "config.loss.coupling",
    "config.loss.distribution", "config.loss.solver", "config.loss.weighting", "config.mesh.rules",
    "config.low_res.augmentation", "config.low_res.augmentation.*", "config.optimizer.arguments",
    "config.ema", "config.ema.*", "config.sampling.solver", "config.sampling.grid",
    "config.sampling.threshold", "config.loss.null_rate",
)  # fmt: skip
#: Fields that hold a section or a value of these types.
EITHER: Mapping[str, tuple[type, ...]] = {
    "config.sampling.threshold": (str, type(None)), "config.loss.null_rate": (float, int),
}  # fmt: skip

_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string",
    tuple: "a tuple like 1,2", list: "a list like 1,2",
}  # fmt: skip
_WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_MISSING = object()
# What is in front of a field of a cascade's stage: its config is a whole one.
_STAGE = re.compile(r"^config\.stages\.\d+")


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a Python file, with overrides in absl's style, locked.

    Args:
      path: `configs/x.py`, or `configs/x.py:text` to call `get_config("text")`; or what `to_json`
        wrote, such as the config.json of a run, whose config this then is.
      overrides: the words of the command line: `--config.a.b=value`, or `--config.a.b` and `value`;
        for a true-or-false field also `--config.a.b` and `--noconfig.a.b`. A value is read as the
        type that the field has: tuples as `1,2` or `(1, 2)`, a section as `{"name": "ddim"}`,
        nothing as `None`.

    Raises:
      UserError: no such file, an error in it, an unknown field, or a value of another type.
    """
    config = _read(path)
    with config.unlocked():
        for name, text in _pairs(config, list(overrides)):
            _set(config, name, text)
    return from_json(to_json(config))


def points(path: str, name: str = "") -> list[dict[str, Any]]:
    """What `sweep()` of a config file yields: the overrides of each point, unchecked.

    Args:
      path: as in `load`.
      name: the sweep; `sweep_large()` for "large".

    Raises:
      UserError: no such file or function, an error in it, or a point that is not a dict.
    """
    file = str(path).partition(":")[0]
    found = _call(file, f"sweep_{name}" if name else "sweep")
    if not isinstance(found, list | tuple):
        raise UserError(f"{file}: sweep() yields dicts like {{'seed': 1}}; it gave {found!r}.")
    for i, point in enumerate(found):
        if not isinstance(point, Mapping) or not all(isinstance(key, str) for key in point):
            raise UserError(f"{file}: point {i} of sweep() is {point!r}; a dict like {{'seed': 1}} "
                            "is needed, with names of fields.")  # fmt: skip
    return [dict(point) for point in found]


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON; tuples are written as lists.

    Raises:
      UserError: a field holds something that JSON does not (the field is named).
    """
    return json.dumps(_plain("config", config), indent=2)


def from_json(text: str) -> ConfigDict:
    """The locked config that `to_json` wrote; lists come back as tuples.

    Raises:
      UserError: the text is not a JSON object.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"the config is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"the config is not a JSON object but {type(tree).__name__}.")
    return ConfigDict(_tuples(tree)).lock()


def completed(config: ConfigDict, defaults: ConfigDict, section: str = "config") -> ConfigDict:
    """`config` with the fields it lacks taken from `defaults`: one written before they existed.

    The open sections (see `OPEN`) are left as they are: their fields belong to what they name.
    """
    with config.unlocked():
        for name, value in defaults.items():
            inside = f"{section}.{name}"
            if name not in config:
                config[name] = value
            elif isinstance(value, ConfigDict) and not _is_open(inside):
                completed(config[name], value, inside)
    return config


def differences(a: ConfigDict, b: ConfigDict) -> list[str]:
    """One line for each field in which b differs from a: `train.steps: 100 -> 200`."""
    left, right = dict(fields(a)), dict(fields(b))
    names = [*left, *(name for name in right if name not in left)]
    show = lambda tree, name: repr(tree[name]) if name in tree else "absent"
    return [
        f"{name}: {show(left, name)} -> {show(right, name)}"
        for name in names
        if left.get(name, _MISSING) != right.get(name, _MISSING)
    ]


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field as (`train.steps`, value), depth first; an empty section is a field too."""
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, ConfigDict) and len(value):
            yield from fields(value, name)
        else:
            yield name, {} if isinstance(value, ConfigDict) else value


def _read(path: str) -> ConfigDict:
    """Runs the file and calls its get_config, or reads what `to_json` wrote."""
    name, colon, argument = str(path).partition(":")
    if pathlib.Path(path).is_file():
        name, colon = str(path), ""  # a path may hold a colon itself
    if name.endswith(".json") and pathlib.Path(name).is_file():
        try:
            return from_json(pathlib.Path(name).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"config file {name} cannot be read: {error}") from None
    config = _call(name, "get_config", *([argument] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{name}: get_config() returned {type(config).__name__}; it must return an "
            "ml_collections.ConfigDict."
        )
    return config


def _call(name: str, function: str, *arguments: str) -> Any:
    """Runs a Python file and calls one of its functions; what a generator yields, as a list."""
    file = pathlib.Path(name)
    if not file.is_file():
        raise UserError(f"config file {name} does not exist.{_offer(file)}")
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    if spec is None:
        raise UserError(f"config file {name} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    # A config may import its neighbours; nothing of it stays behind, in the search path or on disk.
    sys.path.insert(0, str(file.parent))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UserError(f"config file {name} has no function {function}().")
        found = getattr(module, function)(*arguments)
        return list(found) if isinstance(found, Iterator) else found
    except UserError:
        raise
    except Exception as error:
        raise UserError(_place(file, error)) from error
    finally:
        sys.path.remove(str(file.parent))
        sys.dont_write_bytecode = writes


def _offer(file: pathlib.Path) -> str:
    """The config files that the user may have meant."""
    for folder in (file.parent, pathlib.Path("configs")):
        near = sorted(str(f) for f in folder.glob("*.py") if not f.name.startswith("_"))
        if near:
            guess = difflib.get_close_matches(str(folder / file.name), near, n=1)
            hint = f" Did you mean {guess[0]}?" if guess else ""
            return f"{hint} There are: {', '.join(near)}."
    return f" There is no config file in {file.parent} nor in configs."


def _place(file: pathlib.Path, error: Exception) -> str:
    """`file, line n: kind of error: message`, in one line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if pathlib.Path(f.filename) == file.absolute()]
    inside = inside or [f for f in frames if pathlib.Path(f.filename) == file]
    where = f", line {inside[-1].lineno}" if inside else ""
    return f"{file}{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def _pairs(config: ConfigDict, words: list[str]) -> Iterator[tuple[str, str]]:
    """(full name, text of the value) of each override."""
    while words:
        word = words.pop(0)
        option, equals, text = word.partition("=")
        name = option.removeprefix("--no").removeprefix("--")
        if not (option.startswith(("--config.", "--noconfig."))):
            raise UserError(f"{word!r} is not an override; they look like --config.train.steps=100")
        is_bool = isinstance(_get(config, name), bool)
        if option.startswith("--no"):
            if not is_bool or equals:
                raise UserError(f"--no{name} is for a true-or-false field; {name} is none.")
            yield name, "false"
        elif equals:
            yield name, text
        elif words and not words[0].startswith("--") and (not is_bool or _is_word(words[0])):
            yield name, words.pop(0)
        elif is_bool:
            yield name, "true"
        else:
            raise UserError(f"{name} has no value: write --{name}=VALUE")


def _is_word(text: str) -> bool:
    return text.lower() in _WORDS


def _get(config: ConfigDict, name: str) -> Any:
    """The value at a full name, None if it can be added. Raises UserError with the nearest name."""
    section, last = _section(config, name)
    return section.get(last)


def _section(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    """The section that holds a full name, and the name in it."""
    *parents, last = name.split(".")[1:]
    section: Any = config
    for i, part in enumerate([*parents, last]):
        where = ".".join(["config", *parents[:i]])
        if not isinstance(section, ConfigDict):
            raise UserError(f"{name} is not known: {where} is no section but {section!r}.")
        if part not in section and (i < len(parents) or not _is_open(where)):
            raise UserError(_unknown(config, name, section, where))
        if i < len(parents):
            section = section[part]
    return section, last


def _is_open(section: str) -> bool:
    section = _STAGE.sub("config", section)
    return any(fnmatch.fnmatchcase(section, pattern) for pattern in OPEN)


def _unknown(config: ConfigDict, name: str, section: ConfigDict, where: str) -> str:
    """What to say of a name that is not in a section: the same word elsewhere, or the nearest."""
    known = [n for n, _ in fields(config, "config")]
    last = name.rpartition(".")[2]
    same = [n for n in known if n.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, same, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if near:
        return f"{name} is not known. Did you mean {near[0]}?"
    return f"{name} is not known; {where} has {', '.join(section) or 'no fields'}."


def _set(config: ConfigDict, name: str, text: str) -> None:
    section, last = _section(config, name)
    if last not in section:
        section[last] = _any(text)
        return
    if kinds := EITHER.get(_STAGE.sub("config", name)):
        value = None if text in ("None", "none") else _any(text)
        if isinstance(value, bool) or not isinstance(value, (*kinds, dict)):
            raise _mismatch(name, text, section[last], kinds[0])
        del section[last]  # replaced, whatever it was
        section[last] = value
        return
    stored = dict(section.items(preserve_field_references=True))[last]
    if text in ("None", "none"):
        # Only a placeholder, or what is None already, says that it may be None.
        if not isinstance(stored, FieldReference) and section[last] is not None:
            raise _mismatch(name, text, section[last], section.get_type(last))
        section[last] = None
        return
    value = _parse(name, section[last], section.get_type(last), text)
    if isinstance(section[last], ConfigDict):
        del section[last]  # replaced, not merged
    section[last] = value


def _parse(name: str, old: Any, kind: type, text: str) -> Any:
    """The text as a value of the kind that the field holds; `old` is for messages."""
    if kind is bool and _is_word(text):
        return _WORDS[text.lower()]
    if kind in (int, float):
        return _number(name, old, kind, text)
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_sequence(name, old or (), kind, text))
    if kind is type(None):
        return _any(text)
    literal = _literal(text)
    if not issubclass(kind, ConfigDict) or not isinstance(literal, dict):
        raise _mismatch(name, text, old, kind)
    return _tuples(literal)


def _number(name: str, old: Any, kind: type, text: str) -> int | float:
    try:
        number = float(text)
        if kind is float:
            return number
        # 1e5 is a usual way to write a whole number; 8.0 is not.
        return int(number) if "e" in text.lower() and number.is_integer() else int(text)
    except (ValueError, OverflowError):
        raise _mismatch(name, text, old, kind) from None


def _sequence(name: str, old: Sequence[Any], kind: type, text: str) -> list[Any]:
    """`1,2`, `(1, 2)`, `[1, 2]`, or one value; each of the type of the elements there were."""
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    parts = [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]
    if not old:
        return [_any(part) for part in parts]
    # The widest element tells the type: (1, 2.5) is a tuple of floats.
    like = next((v for v in old if isinstance(v, float)), old[0])
    try:
        return [_parse(name, like, type(like), part) for part in parts]
    except UserError:
        raise _mismatch(name, text, old, kind) from None


def _any(text: str) -> Any:
    """The text as a literal where it is one, else itself."""
    if _is_word(text) and not text.isdigit():
        return _WORDS[text.lower()]
    literal = _literal(text)
    return text if literal is _MISSING else _tuples(literal)


def _literal(text: str) -> Any:
    """The text as a Python or JSON literal, or _MISSING."""
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return _MISSING


def _mismatch(name: str, text: str, old: Any, kind: type) -> UserError:
    if isinstance(old, ConfigDict):
        example = json.dumps(_plain(name, old))
        example = example if len(example) < 80 else '{"field": value, ...}'
        return UserError(
            f"{name}={text} given, but {name} is a section; set one of its fields "
            f"({', '.join(old)}), or all of them as --{name}='{example}'"
        )
    return UserError(
        f"{name}={text} given; it takes {_KINDS.get(kind, kind.__name__)} "
        f"(the config file has {old!r})."
    )


def _plain(name: str, value: Any) -> Any:
    """Dicts, lists and JSON's scalars."""
    if isinstance(value, ConfigDict | dict):
        return {key: _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{name} is {value!r}; a config holds numbers, strings, true or false, None, tuples and "
        "sections of these."
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
