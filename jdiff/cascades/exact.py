"""The exact denoiser of a data set given a low-resolution input: a stage that needs no training."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff import denoisers
from jdiff.cascades.augmentations.base import Nothing
from jdiff.cascades.augmentations.gaussian import Gaussian
from jdiff.cascades.low_res import LowRes
from jdiff.denoisers import Mixture
from jdiff.errors import UserError
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, expand, struct
from jdiff.schedules import is_schedule


@struct
class Exact(Mixture):
    """The denoiser that `exact` makes.

    With x_t = alpha x0 + sigma eps and the input z = a S x0 + b eps', where S makes images smaller
    and a, b are alpha and sigma of the augmentation at its level, image k has the weight

        r_k ~ w_k N(x_t; alpha x_k, sigma^2) N(z; a S x_k, max(b, tolerance)^2)

    Attributes:
      low_res: the input.
      smaller: `[N, h, w, C]`, S x_k.
      tolerance: the deviation of an input that has no noise.
    """

    low_res: LowRes
    smaller: Array
    tolerance: Array | float

    def __call__(self, x: Array, t: Array, cond: PyTree = None) -> Prediction:
        """x `[B, H, W, C]`, t `[B]`; cond holds the entries of `LowRes.condition`, and "label"."""
        if not self.low_res.residual:
            return super().__call__(x, t, cond)
        t = broadcast_time(t, x)
        base = self.low_res.enlarge(cond["low_res"], x.shape)
        # The residual's x_t is that of the image, less alpha times what was taken off.
        image = super().__call__(x + expand(self.schedule.alpha(t), x) * base, t, cond)
        return image._replace(x0=image.x0 - base)

    def _selection(self, cond: PyTree, batch: int) -> Array:
        """`[B, N]` log weights: those of the label, times the likelihood of the input."""
        if not cond or "low_res" not in cond:
            raise UserError('exact: cond["low_res"] [B, h, w, C] is missing.')
        z = cond["low_res"][:, None]
        a, b = jnp.ones(()), jnp.zeros(())
        if self.low_res.augmentation.tells:
            schedule = self.low_res.augmentation.schedule
            a, b = (expand(f(cond["aug_level"]), z) for f in (schedule.alpha, schedule.sigma))
        variance = jnp.squeeze(jnp.maximum(b, self.tolerance) ** 2)

        def squares(part: Array) -> Array:  # [chunk, h, w, C] -> [B, chunk]
            return jnp.sum(jnp.square(z - a * part), axis=(2, 3, 4))

        parts = self.smaller.reshape(-1, self.chunk, *self.smaller.shape[1:])
        square = jnp.moveaxis(jax.lax.map(squares, parts), 0, 1).reshape(batch, -1)
        log_w = super()._selection(cond, batch) - 0.5 * square / expand(variance, square)
        # Only differences matter, and they keep their digits next to the largest weight.
        return log_w - log_w.max(1, keepdims=True)


def exact(
    images: Array, schedule: Any, low_res: LowRes, *, labels: Array | None = None,
    null: int | None = None, tolerance: float = 0.01, chunk: int = 1024,
) -> Exact:  # fmt: skip
    """The MMSE denoiser of a data set under a low-resolution input: `denoisers.exact` with one.

    A stage with it makes images of the data set whose smaller form explains the input.

    Args:
      images: `[N, H, W, C]` floats.
      schedule: one schedule.
      low_res: the input: none or Gaussian augmentation, whose likelihoods are known.
      labels: `[N]` integers, and `null`: as of `denoisers.exact`.
      tolerance: the deviation within which an input without noise matches an image.
      chunk: images at a time.

    Raises:
      UserError: another augmentation, more than one schedule, images of a size that the factor
        does not divide, or what `denoisers.exact` refuses.
    """
    kind = low_res.augmentation
    if not isinstance(kind, Gaussian | Nothing):
        raise UserError(
            f"exact: the augmentation {kind.name} has no likelihood in closed form; "
            "give gaussian() or none()."
        )
    if not is_schedule(schedule):
        raise UserError(f"exact: schedule: one Schedule is needed, given {schedule!r}.")
    base = denoisers.exact(images, schedule, labels, null, chunk)
    return Exact(
        **vars(base), low_res=low_res, smaller=low_res.shrink(base.means), tolerance=tolerance
    )
