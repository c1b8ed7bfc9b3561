"""Errors that a person can act on: what was given, what is allowed, the nearest choice."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with 2."""


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
    raise UserError(f"{what} {given!r} is not known.{hint} Allowed: {', '.join(allowed)}.")
