"""JSON files of folders that others wrote: read, or refused in one clear line."""

import json
import pathlib
from typing import Any

from jdiff.errors import UserError

#: What git writes in the place of a large file until `git lfs pull` fetches it.
POINTER = b"version https://git-lfs"


def read(path: str | pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: it is not there, cannot be read, is a pointer of git-lfs, or holds anything else.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is not there.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    refuse_pointer(path, text)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object but {type(found).__name__}.")
    return found


def refuse_pointer(path: pathlib.Path, begins: bytes) -> None:
    """That a file is there itself, by its first bytes.

    Raises:
      UserError: a pointer of git-lfs stands in its place.
    """
    if begins.startswith(POINTER):
        raise UserError(f"{path} is a pointer of git-lfs; `git lfs pull` fetches the file itself.")
