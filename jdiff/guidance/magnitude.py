"""Magnitude-aware guidance, MAMBO-G (Zhu et al. 2025, 2508.03442)."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import schedule_of
from jdiff.errors import UserError
from jdiff.guidance.base import Pair, Refinement, check_target, refinable, root, sum_dims, to_target
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, static, struct
from jdiff.solvers.base import safe_ratio


@struct
class Magnitude(Refinement):
    """The guided denoiser that `magnitude` makes."""

    denoiser: Any
    damping: Array | float
    target: str = static("velocity")

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The pair with the scale 1 + (w - 1) exp(-damping r), r = |good - bad| / |bad|."""
        bad, good = (to_target(self.target, self.schedule, p, t) for p in (pair.bad, pair.good))
        square = lambda tree: sum(sum_dims(a**2).reshape(-1) for a in jax.tree.leaves(tree))
        difference = square(jax.tree.map(jnp.subtract, good, bad))
        ratio = root(safe_ratio(difference, square(bad)))
        w = 1.0 + (pair.w - 1.0) * jnp.exp(-self.damping * ratio)
        return self.denoiser.guide(x, t, pair._replace(w=w))


def magnitude(denoise: Any, damping: Array | float = 8.0, target: str = "velocity") -> Magnitude:
    """Guides less where the guidance is large: w becomes 1 + (w - 1) exp(-damping r).

    r = |good - bad| / |bad| of each sample, over all leaves. damping = 0 is CFG; the paper's alpha
    is 8, on velocities.

    Args:
      denoise: a guidance that extrapolates (cfg, ...).
      target: the space of the norms: "velocity", "v", "x0", "eps" or "score".

    Raises:
      UserError: a negative damping, nothing to refine, no schedule, or an unknown target.
    """
    if isinstance(damping, int | float) and damping < 0:
        raise UserError(f"magnitude: damping={damping} given; it is 0 or more.")
    refinable("magnitude", denoise)
    check_target("magnitude", target, schedule_of(denoise, where="magnitude"))
    return Magnitude(denoise, damping, target)
