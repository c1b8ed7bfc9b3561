"""From config.low_res to what a super-resolution stage's network and its sampling are told."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from jdiff.errors import UserError, accepted, choose


def low_res(config: ml_collections.ConfigDict, info: Any) -> Any:
    """The `cascades.LowRes` of config.low_res for images as `info` describes; None without factor.

    Raises:
      UserError: an unknown name or argument, or a factor that does not divide the images' sides
        (with the nearest that does).
    """
    c = config.low_res
    if c.factor is None:
        return None
    from jdiff.cascades import augmentations
    from jdiff.cascades.low_res import low_res as construct

    height, width, _ = info.shape
    common = math.gcd(height, width)
    factors = [n for n in range(2, common + 1) if common % n == 0]
    if not c.factor > 1 or any((n / c.factor) % 1 for n in (height, width)):
        near = min(factors, key=lambda n: abs(n - c.factor), default=None)
        hint = "no whole number does" if near is None else f"the nearest that does is {near}"
        raise UserError(
            f"config.low_res.factor={c.factor:g} does not divide the images' {height} x {width} "
            f"pixels (config.data.size); {hint}."
        )
    augmentation = augmentations.build(c.augmentation)
    try:
        return construct(c.factor, augmentation, down=c.down, up=c.up, residual=c.residual)
    except UserError as error:
        raise UserError(f"config.low_res: {error}") from error


def level(config: ml_collections.ConfigDict, low_res: Any) -> Any:
    """The level of config.sampling at which a stage's input is augmented; None without an input.

    Raises:
      UserError: the network is told a level and there is none, training had no such level, or there
        is no input.
    """
    given = config.sampling.aug_level
    if low_res is None:
        if given is not None or config.sampling.truncate:
            field = "truncate" if given is None else "aug_level"
            raise UserError(
                f"config.sampling.{field}={config.sampling[field]} is of a low-resolution input, "
                "which config.low_res.factor=None says that there is not."
            )
        return None
    try:
        return low_res.augmentation.at(given)
    except UserError as error:
        raise UserError(f"config.sampling.aug_level={given}: {error}") from error


def filled(
    arguments: Mapping[str, Any], name: str, known: Collection[str], info: Any, low_res: Any
) -> dict[str, Any]:
    """The `arguments` of a network with those that its low-resolution input fixes.

    Args:
      name: of the network's family.
      known: the arguments that the family takes.

    Raises:
      UserError: a family that takes no such input, or arguments that contradict config.low_res.
    """
    from jdiff import models

    given = dict(arguments)
    scalars = tuple(given.get("scalars", ()))
    if low_res is None:
        for field, wants in {
            "low_res_channels": given.get("low_res_channels", 0), "scalars": "aug_level" in scalars
        }.items():  # fmt: skip
            if wants:
                raise UserError(
                    f"config.model.{field}={given[field]}: the network is told of a low-resolution "
                    "input; by how much smaller that is, config.low_res.factor says, e.g. 2."
                )
        return given
    tells = low_res.augmentation.tells
    needs = {"low_res_channels": info.shape[-1], "low_res_method": low_res.up}
    needed = {*needs, "scalars"} if tells else set(needs)
    if needed - set(known):
        able = [n for n, cls in models.BY_NAME.items() if needed <= set(accepted(cls))]
        choose("config.model.name of a network with a low-resolution input", name, able)
    for field, value in needs.items():
        if given.setdefault(field, value) != value:
            raise UserError(
                f"config.model.{field}={given[field]!r} does not fit config.low_res, by which it "
                f"is {value!r}."
            )
    if "aug_level" in scalars and not tells:
        raise UserError(
            f"config.model.scalars={scalars}: config.low_res.augmentation "
            f"{type(low_res.augmentation).__name__} has no level that a network is told; leave "
            "'aug_level' out."
        )
    if tells and "aug_level" not in scalars:
        given["scalars"] = (*scalars, "aug_level")
    return given
