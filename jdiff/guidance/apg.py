"""Adaptive projected guidance (Sadat et al. 2024, 2410.02416)."""

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
    root,
    sum_dims,
    to_target,
)
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, expand, static, struct
from jdiff.solvers.base import safe_ratio


@struct
class APG(Refinement):
    """The guided denoiser that `apg` makes."""

    denoiser: Any
    eta: Array | float
    norm: Array | float
    target: str = static("x0")

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The pair whose difference is shortened, and shrunk along the good prediction."""
        bad, good = (to_target(self.target, self.schedule, p, t) for p in (pair.bad, pair.good))
        value = jax.tree.map(lambda b, g: g - self._project(g - b, g), bad, good)
        projected = from_target(self.target, self.schedule, value, x, t, pair.bad)
        return self.denoiser.guide(x, t, pair._replace(bad=projected))

    def _project(self, diff: Array, good: Array) -> Array:
        length = root(sum_dims(diff**2))
        limit = jnp.minimum(1.0, safe_ratio(expand(self.norm, diff), length))
        diff = jnp.where(length > 0, limit, 1.0) * diff
        parallel = safe_ratio(sum_dims(diff * good), sum_dims(good**2)) * good
        return diff - (1.0 - expand(self.eta, diff)) * parallel


def apg(
    denoise: Any, eta: Array | float = 0.0, norm: Array | float = float("inf"), target: str = "x0"
) -> APG:
    """Adaptive projected guidance: good + (w - 1) (orthogonal + eta parallel).

    The difference good - bad is cut to length `norm`, then split along the good prediction; the
    parallel part is what saturates images. Per sample and leaf. eta = 1, norm = inf is CFG. The
    paper's momentum is a memory between steps, which a denoiser has not: `with_momentum(solver,
    beta)` is the solver with it.

    Args:
      denoise: a guidance that extrapolates (cfg, autoguidance, ...).
      eta: what is kept of the parallel part; the paper's 0.
      norm: the paper's r: 2.5 to 15 by model, in the units of x and growing as sqrt(dimensions).
      target: the space of projection and norm: the paper's is the denoised "x0".

    Raises:
      UserError: a norm that is not positive, nothing to refine, no schedule, an unknown target.

    >>> guided = guidance.apg(guidance.cfg(denoise, 7.5, null), norm=15.0)
    >>> solver = guidance.with_momentum(solvers.ddim(), beta=-0.5)
    """
    if isinstance(norm, int | float) and not norm > 0:
        raise UserError(f"apg: norm={norm} given; it is positive (inf: no limit).")
    refinable("apg", denoise)
    check_target("apg", target, schedule_of(denoise, where="apg"))
    return APG(denoise, eta, norm, target)
