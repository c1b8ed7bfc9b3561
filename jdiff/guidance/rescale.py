"""Rescaling guided predictions to the deviation of the conditional one (Lin et al. 2023)."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import schedule_of
from jdiff.errors import UserError
from jdiff.guidance.base import (
    Pair,
    Refinement,
    check_target,
    from_target,
    refinable,
    to_target,
)
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, expand, static, struct
from jdiff.solvers.base import safe_ratio


@struct
class Rescale(Refinement):
    """The guided denoiser that `rescale` makes."""

    denoiser: Any
    share: Array | float
    target: str = static("x0")

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The inner result, rescaled in the target's space."""
        guided = self.denoiser.guide(x, t, pair)
        made, good = (to_target(self.target, self.schedule, p, t) for p in (guided, pair.good))
        value = jax.tree.map(self._rescale, made, good)
        return from_target(self.target, self.schedule, value, x, t, guided)

    def _rescale(self, guided: Array, good: Array) -> Array:
        axes = tuple(range(1, guided.ndim))
        wanted, made = (jnp.std(a, axes, keepdims=True) for a in (good, guided))
        ratio = jnp.where(made > 0, safe_ratio(wanted, made), 1.0)  # a constant has no deviation
        return guided * (1.0 + expand(self.share, guided) * (ratio - 1.0))


def rescale(denoise: Any, share: Array | float = 0.7, target: str = "x0") -> Rescale:
    """Gives back `share` of the standard deviation that guidance added, per sample and leaf.

    guided (1 - share + share std(good) / std(guided)): Lin et al. 2023 (2305.08891), section
    3.4, who do it to the network's output (share 0.7): give target="v" or "eps" for theirs.

    Args:
      denoise: a guidance that extrapolates (cfg, autoguidance, ...), refined or not.
      share: 0 to 1.
      target: the space it is done in: "x0", "v", "velocity", "eps" or "score".

    Raises:
      UserError: a share outside [0, 1], nothing to refine, no schedule, or an unknown target.
    """
    if isinstance(share, int | float) and not 0 <= share <= 1:
        raise UserError(f"rescale={share} given; it lies in [0, 1].")
    refinable("rescale", denoise)
    check_target("rescale", target, schedule_of(denoise, where="rescale"))
    return Rescale(denoise, share, target)
