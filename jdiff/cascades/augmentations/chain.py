"""Several augmentations, one after the other."""

from typing import Any

import jax

from jdiff.cascades.augmentations.base import Augmentation
from jdiff.errors import UserError
from jdiff.pytree import Array, struct


@struct
class Chain(Augmentation):
    """The augmentation that `chain` makes; its levels are a tuple, one a part."""

    parts: tuple[Augmentation, ...]

    name = "chain"

    @property
    def tells(self) -> bool:
        """Whether one of the parts does."""
        return any(part.tells for part in self.parts)

    @property
    def low(self) -> Array | float:
        """Of the level that is told, else 0."""
        return next((part.low for part in self.parts if part.tells), 0.0)

    @property
    def high(self) -> Array | float:
        """Of the level that is told, else 0."""
        return next((part.high for part in self.parts if part.tells), 0.0)

    def draw(self, key: Array, num: int) -> tuple:
        """Each part's levels of training."""
        return tuple(
            part.draw(jax.random.fold_in(key, i), num) for i, part in enumerate(self.parts)
        )

    def __call__(self, keys: Array, images: Array, level: tuple) -> Array:
        """One part after the other, each with keys of its own."""
        for i, (part, its) in enumerate(zip(self.parts, self._each(level))):
            images = part(jax.vmap(jax.random.fold_in, (0, None))(keys, i), images, its)
        return images

    def at(self, level: Any = None) -> tuple:
        """One number is the level that is told, the rest is 0; a tuple has a level for each part.

        Raises:
          UserError: a level is missing, or out of range; one number where none is told.
        """
        if level is None or isinstance(level, tuple | list):
            its = [None] * len(self.parts) if level is None else self._each(level)
            return tuple(part.at(l) for part, l in zip(self.parts, its))
        if not self.tells:
            raise UserError(
                f"augmentation chain: level={level!r} given, but no part tells its level; give "
                f"none, or a tuple of {len(self.parts)}."
            )
        return tuple(part.at(level if part.tells else None) for part in self.parts)

    def told(self, level: tuple) -> Array | None:
        """The level of the part that tells, or None."""
        each = zip(self.parts, self._each(level))
        return next((part.told(its) for part, its in each if part.tells), None)

    def check(self, level: Any) -> None:
        """As each part does."""
        for part, its in zip(self.parts, self._each(level)):
            part.check(its)

    def _each(self, level: Any) -> tuple:
        if not isinstance(level, tuple | list) or len(level) != len(self.parts):
            raise UserError(
                f"augmentation chain: a tuple of {len(self.parts)} levels is needed, given "
                f"{level!r}."
            )
        return tuple(level)


def chain(*augmentations: Augmentation) -> Chain:
    """Augmentations one after the other, e.g. blur, down_up and jpeg as in Real-ESRGAN.

    Levels are tuples. At most one part tells the network its level: `cond` has room for one.

    Raises:
      UserError: nothing to chain, something else than an augmentation, or two parts that tell.

    >>> chain(blur(), gaussian(high=0.5))
    """
    if not augmentations:
        raise UserError("chain: no augmentation given; at least one is needed.")
    for part in augmentations:
        if not isinstance(part, Augmentation):
            raise UserError(f"chain: augmentations are needed, given {part!r}.")
    telling = [part.name for part in augmentations if part.tells]
    if len(telling) > 1:
        raise UserError(
            f"chain: {' and '.join(telling)} both tell the network their level; at most one can "
            "(tells=False switches it off for all but gaussian)."
        )
    return Chain(tuple(augmentations))
