"""A stage's low-resolution input: how images are made smaller, augmented, enlarged and taken off.

One `LowRes` serves the training of a stage and its sampling, so that they cannot differ: in
training the input is the image itself, made smaller; in sampling it is what the stage before made.
"""

import jax
import jax.numpy as jnp

from jdiff.cascades.augmentations import Augmentation, none
from jdiff.errors import UserError, choose
from jdiff.pytree import Array, PyTree, static, struct
from jdiff.schedules.base import real

#: How images are made smaller: "area" is the mean of factor x factor pixels; "bilinear" and
#: "bicubic" (Keys, a = -1/2) are widened by the factor against aliasing; "nearest" takes one pixel.
DOWN = ("area", "bilinear", "bicubic", "nearest")
#: How a small image is enlarged, with pixels as areas.
UP = ("bilinear", "bicubic", "nearest")


@struct
class LowRes:
    """The low-resolution input that `low_res` makes.

    Attributes:
      augmentation: of the small image, in training and sampling alike.
      factor: by how much the small image is smaller, in height and width.
      down: how images are made smaller, of `DOWN`.
      up: how the small image is enlarged, of `UP`: by the network, and for the residual.
      residual: whether the stage makes the image less the enlarged input (SRDiff, Li et al. 2021).
    """

    augmentation: Augmentation
    factor: int | float = static()
    down: str = static("area")
    up: str = static("bilinear")
    residual: bool = static(False)

    def small(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape `[..., h, w, C]` of the input of images `[..., H, W, C]`.

        Raises:
          UserError: the factor does not divide height and width.
        """
        *batch, height, width, channels = shape
        sides = height / self.factor, width / self.factor
        if any(side < 1 or side % 1 for side in sides):
            raise UserError(
                f"low_res: factor={self.factor} does not divide the images' {height} x {width}."
            )
        return (*batch, int(sides[0]), int(sides[1]), channels)

    def shrink(self, images: Array) -> Array:
        """Images `[B, H, W, C]` made smaller: `[B, h, w, C]`.

        Raises:
          UserError: the factor does not divide height and width.
        """
        shape = self.small(images.shape)
        if self.down == "area":
            batch, height, width, channels = shape
            cells = images.reshape(batch, height, self.factor, width, self.factor, channels)
            return cells.mean((2, 4))
        return jax.image.resize(images, shape, method=self.down)

    def enlarge(self, small: Array, shape: tuple[int, ...]) -> Array:
        """Small images `[B, h, w, C]` at the size of `shape` (..., H, W, C), as in the network."""
        from jdiff.models.low_res import enlarge

        return enlarge(small, tuple(shape)[-3:-1], self.up)

    def condition(self, keys: Array, small: Array, level: PyTree) -> dict[str, Array]:
        """What the network is told of small images: the one function of training and sampling.

        Args:
          keys: `[B]`, one a sample.
          small: `[B, h, w, C]` in about [-1, 1].
          level: of the augmentation, `[B]` or one number; a tuple of them for a `chain`.

        Returns:
          {"low_res": `[B, h, w, C]`}, and "aug_level" `[B]` if the augmentation tells it.
        """
        level = _each(level, small)
        return self.told(_augmented(self.augmentation, keys, small, level), level)

    def told(self, augmented: Array, level: PyTree) -> dict[str, Array]:
        """The same of images that are augmented already, as the state of a stage that stopped."""
        entries = {"low_res": augmented}
        if self.augmentation.tells:
            entries["aug_level"] = self.augmentation.told(_each(level, augmented))
        return entries

    def training(self, key: Array, x0: Array) -> tuple[Array, dict[str, Array]]:
        """What the stage learns from images x0 `[B, H, W, C]`, and under which condition.

        Returns:
          x0 itself, or x0 less the enlarged (augmented) input if `residual`; and the entries of
          `condition`, at levels that the augmentation draws.
        """
        key_level, key_samples = jax.random.split(key)
        level = self.augmentation.draw(key_level, len(x0))
        keys = jax.random.split(key_samples, len(x0))
        cond = self.condition(keys, self.shrink(x0), level)
        return (x0 - self._base(cond, x0) if self.residual else x0), cond

    def finish(self, sample: Array, cond: dict[str, Array]) -> Array:
        """Images from what the stage made under `cond`: adds what `training` took off."""
        return sample + self._base(cond, sample) if self.residual else sample

    def _base(self, cond: dict[str, Array], like: Array) -> Array:
        return self.enlarge(cond["low_res"], like.shape).astype(like.dtype)


def low_res(
    factor: int | float,
    augmentation: Augmentation | None = None,
    down: str = "area",
    up: str = "bilinear",
    residual: bool = False,
) -> LowRes:
    """The low-resolution input of a super-resolution stage.

    Args:
      factor: by how much the input is smaller than the stage's images, in height and width.
      augmentation: of the input, from `cascades.augmentations`; none unless given.
      down: how training makes the input from an image, of `DOWN`. By "area" the input of every
        stage is the same image, whatever stages are between.
      up: how the network enlarges the input, of `UP`.
      residual: the stage makes the image less the enlarged input (SRDiff, Li et al. 2021).

    Raises:
      UserError: a factor that is not above 1, or not whole for "area"; an unknown name; something
        that is no augmentation.

    >>> low_res(4, augmentations.gaussian())
    """
    if not factor > 1:
        raise UserError(f"low_res: factor={factor} given; it must be above 1, e.g. 2.")
    factor = int(factor) if float(factor).is_integer() else float(factor)
    if choose("low_res: down", down, DOWN) == "area" and isinstance(factor, float):
        raise UserError(
            f"low_res: factor={factor} is not whole, which down='area' needs; give 'bicubic'."
        )
    augmentation = none() if augmentation is None else augmentation
    if not isinstance(augmentation, Augmentation):
        given = getattr(augmentation, "__name__", repr(augmentation))
        raise UserError(
            f"low_res: augmentation={given} is not an augmentation; call one, e.g. "
            "cascades.augmentations.gaussian()."
        )
    return LowRes(augmentation, factor, down, choose("low_res: up", up, UP), bool(residual))


@jax.jit
def _augmented(augmentation: Augmentation, keys: Array, small: Array, level: PyTree) -> Array:
    """Compiled wherever it is called, as operations one by one differ in the last bit."""
    return augmentation(keys, small, level)


def _each(level: PyTree, images: Array) -> PyTree:
    """A level for each sample `[B]`, float32 or better."""

    return jax.tree.map(lambda a: jnp.broadcast_to(real(a), images.shape[:1]), level)
