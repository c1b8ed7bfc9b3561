"""Errors that a person can act on: what was given, what is allowed, the nearest choice."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jdiff import exits


class UserError(ValueError):
    """What a person can put right; the command line prints it as one line and exits with `code`.

    Attributes:
      code: 2, a mistake in what was given; a fault of the surroundings has another (jdiff.exits).
    """

    code = exits.USER


class Leaving(Exception):
    """An end that somebody asked for, and no error; the command line exits with `code`."""

    code = exits.REQUEUE


def told(error: BaseException) -> tuple[str, int]:
    """What the command line says of an error, and the exit code that goes with it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", exits.INTERRUPTED
    if isinstance(error, Leaving):
        return text, error.code
    if isinstance(error, UserError):
        return f"error: {text}", error.code
    return (
        f"error: {type(error).__name__}: {text}\n"
        "       This should not happen. The same command with --traceback shows where."
    ), exits.FAILED


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Returns `given` if it is allowed, else raises a `UserError` that offers the nearest name.

    >>> choose("solver", "huen", ["heun", "euler"])
    UserError: solver 'huen' is not known. Did you mean 'heun'? Allowed: euler, heun.
    """
    allowed = sorted(allowed)
    if given in allowed:
        return given
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"{what} {given!r} is not known.{hint} Allowed: {', '.join(allowed) or 'none'}."
    )


def positive(where: str, **numbers: Any) -> None:
    """Raises a UserError that names the first number at or below 0; arrays are let through."""
    for name, value in numbers.items():
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"{where}: {name}={value} given; it must be positive.")


def not_negative(where: str, **numbers: Any) -> None:
    """Raises a UserError that names the first number below 0; arrays are let through."""
    for name, value in numbers.items():
        if isinstance(value, int | float) and not value >= 0:
            raise UserError(f"{where}: {name}={value} given; it must not be negative.")


def call(what: str, table: Mapping[str, Callable[..., Any]], config: Mapping[str, Any]) -> Any:
    """Calls the entry of `table` that `config["name"]` names with the rest of `config`.

    Raises:
      UserError: an unknown name or argument, with the nearest one.

    >>> call("schedule", schedules.BY_NAME, {"name": "edm", "sigma_max": 100.0})
    """
    arguments = dict(config)
    if "name" not in arguments:
        raise UserError(f"{what}: name is missing. Allowed: {', '.join(sorted(table))}.")
    name = arguments.pop("name")
    fn = table[choose(what, name, table)]
    for argument in arguments:
        choose(f"{what} {name}: argument", argument, accepted(fn))
    return fn(**arguments)


def accepted(fn: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a function or class takes."""
    signature = inspect.signature(fn.__init__ if isinstance(fn, type) else fn)
    return [name for name in signature.parameters if name != "self"]
