"""What every augmentation offers, and the one that does nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError
from jdiff.pytree import Array, PyTree, expand, is_concrete, struct
from jdiff.schedules.base import real

_ROUNDING = 1e-6  # relative, of levels given in float32


class Augmentation:
    """What an augmentation of low-resolution images offers. A subclass defines `apply` and a range.

    The same function serves training, with drawn levels, and sampling, with a given one. Every
    sample has its own key and level, so that a row of the result depends on no other. Level 0 is
    the identity, bit for bit, for every kind.

    Attributes:
      name: as configs name it.
      low: the lowest level of training, in the augmentation's own units.
      high: the highest.
      tells: whether the network is told the level.
      optional: whether sampling may do without, at level 0, whatever the range.
    """

    name: str
    low: Array | float
    high: Array | float
    tells: bool = False
    optional: bool = False

    def draw(self, key: Array, num: int) -> PyTree:
        """Levels of training `[num]`, float32, one a sample: uniform from low to high."""
        return jax.random.uniform(key, (num,), jnp.float32, self.low, self.high)

    def __call__(self, keys: Array, images: Array, level: PyTree) -> Array:
        """The augmented images `[B, h, w, C]`.

        Args:
          keys: `[B]`, one a sample.
          images: `[B, h, w, C]` in about [-1, 1].
          level: `[B]`, or one number for all.

        Raises:
          UserError: images that are not floats `[B, h, w, C]`, or that this kind does not take.
        """
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"{_where(self)}: images [B, h, w, C] of floats are needed, given {images.dtype} "
                f"of shape {images.shape}."
            )
        level = jnp.broadcast_to(real(level), images.shape[:1])
        made = self.apply(keys, real(images), level).astype(images.dtype)
        return jnp.where(expand(level, images) == 0, images, made)

    def apply(self, keys: Array, images: Array, level: Array) -> Array:
        """The augmentation itself at levels `[B]`; where one is 0, any number will do."""
        raise NotImplementedError  # abstract

    def at(self, level: PyTree = None) -> PyTree:
        """The levels of sampling: `level` for what the network is told, else 0 if there is none.

        Raises:
          UserError: the network is told the level and there is none, or it is out of range.
        """
        if level is None:
            if self.tells:
                raise UserError(
                    f"{_where(self)}: the network is told the level of this augmentation, so that "
                    f"sampling needs one too, from {_show(self.low)} to {_show(self.high)}; none "
                    "given."
                )
            return 0.0
        self.check(level)
        return level

    def told(self, level: PyTree) -> Array | None:
        """What the network is told: the level, or None."""
        return level if self.tells else None

    def check(self, level: PyTree) -> None:
        """Accepts the levels of training, and 0 where that is optional; traced ones pass.

        Raises:
          UserError: a level of which the network saw nothing.
        """
        if isinstance(level, tuple | list | dict):
            raise UserError(f"{_where(self)}: one level (or [B]) is needed, given {level!r}.")
        if not is_concrete((level, self.low, self.high)):
            return
        given = np.asarray(level)
        slack = _ROUNDING * max(abs(float(self.low)), abs(float(self.high)))
        inside = (given >= self.low - slack) & (given <= self.high + slack)
        if self.optional:
            inside |= given == 0
        if not inside.all():
            wrong = np.ravel(given)[np.argmin(np.ravel(inside))]
            raise UserError(
                f"{_where(self)}: level={_show(wrong)} given; training has levels from "
                f"{_show(self.low)} to {_show(self.high)}{', or 0' if self.optional else ''}."
            )


class Degradation(Augmentation):
    """What is done to a share of the images of training, and by default to none in sampling.

    Attributes:
      share: of images that are degraded; the others have level 0.
    """

    share: Array | float
    optional = True

    def draw(self, key: Array, num: int) -> Array:
        """Levels `[num]`, float32: uniform from low to high for a share of them, else 0."""
        key_level, key_share = jax.random.split(key)
        degraded = jax.random.bernoulli(key_share, self.share, (num,))
        return jnp.where(degraded, super().draw(key_level, num), 0.0)


@struct
class Nothing(Augmentation):
    """The augmentation that `none` makes."""

    name, low, high = "none", 0.0, 0.0

    def apply(self, keys: Array, images: Array, level: Array) -> Array:
        """The images."""
        return images


def none() -> Nothing:
    """No augmentation: the only level is 0."""
    return Nothing()


def ranged(where: str, low_name: str, low: Any, high_name: str, high: Any, limits: Any) -> None:
    """Checks two ends of a range, as far as they are concrete.

    Raises:
      UserError: low above high, or one of them outside of `limits`, a pair.
    """
    if not is_concrete((low, high, limits)):
        return
    for name, value in ((low_name, low), (high_name, high)):
        if not limits[0] <= value <= limits[1]:
            raise UserError(
                f"{where}: {name}={_show(value)} given; it lies between {_show(limits[0])} and "
                f"{_show(limits[1])}."
            )
    if low > high:
        raise UserError(f"{where}: {low_name}={_show(low)} is above {high_name}={_show(high)}.")


def _where(augmentation: Augmentation) -> str:
    return f"augmentation {augmentation.name}"


def _show(number: Any) -> str:
    return f"{float(number):.4g}" if is_concrete(number) else str(number)
