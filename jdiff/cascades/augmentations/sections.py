"""Augmentations as configs name them."""

from collections.abc import Callable, Mapping
from typing import Any

from jdiff import schedules
from jdiff.cascades.augmentations.base import Augmentation, none
from jdiff.cascades.augmentations.blur import blur
from jdiff.cascades.augmentations.chain import chain
from jdiff.cascades.augmentations.down_up import down_up
from jdiff.cascades.augmentations.gaussian import gaussian
from jdiff.cascades.augmentations.jpeg import jpeg
from jdiff.errors import UserError, call, choose

#: Augmentations by name. The parts of "chain" are sections called "first", "second", ...
BY_NAME: dict[str, Callable[..., Augmentation]] = {
    "none": none, "gaussian": gaussian, "blur": blur, "jpeg": jpeg, "down_up": down_up,
    "chain": chain,
}  # fmt: skip

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def build(section: Mapping[str, Any], where: str = "config.low_res.augmentation") -> Augmentation:
    """The augmentation of a section with a `name` and arguments.

    A schedule is a section of `schedules.BY_NAME`. The sections of a config are sorted by name, so
    that the parts of a chain are called "first", "second", ... up to "sixth".

    Args:
      section: a ConfigDict or a dict.
      where: its full name, for errors.

    Raises:
      UserError: an unknown name or argument, with the nearest one; a gap in a chain.

    >>> build({"name": "gaussian", "schedule": {"name": "squared_cosine"}, "high": 500.0})
    >>> build({"name": "chain", "first": {"name": "blur"}, "second": {"name": "gaussian"}})
    """
    arguments = _entries(section, where)
    if arguments.get("name") == "chain":
        return chain(*_parts(arguments, where))
    if arguments.get("name") == "gaussian" and arguments.get("schedule") is not None:
        inner = f"{where}.schedule"
        found = call(inner, schedules.BY_NAME, _entries(arguments["schedule"], inner))
        arguments["schedule"] = found
    return call(where, BY_NAME, arguments)


def _parts(arguments: dict[str, Any], where: str) -> list[Augmentation]:
    given = [name for name in arguments if name != "name"]
    for name in given:
        choose(f"{where} chain: part", name, _ORDINALS)
    names = _ORDINALS[: len(given)]
    for name in names:
        if name not in given:
            raise UserError(f"{where} chain: part {name!r} is missing; given: {', '.join(given)}.")
    return [build(arguments[name], f"{where}.{name}") for name in names]


def _entries(section: Any, where: str) -> dict[str, Any]:
    if not hasattr(section, "keys"):  # a ConfigDict is no Mapping
        raise UserError(f'{where}: a section like {{"name": ...}} is needed, given {section!r}.')
    return dict(section)
