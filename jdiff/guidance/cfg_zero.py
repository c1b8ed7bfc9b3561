"""CFG-Zero* (Fan et al. 2025, 2503.18886): an optimised scale of the null, and a zero start."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import as_denoiser, schedule_of
from jdiff.errors import UserError
from jdiff.guidance.base import (
    Guided,
    Pair,
    Refinement,
    check_target,
    from_target,
    refinable,
    sum_dims,
    to_target,
)
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, broadcast_time, expand, static, struct
from jdiff.schedules import first
from jdiff.schedules.base import finite_data
from jdiff.solvers.base import safe_ratio


@struct
class CFGZero(Refinement):
    """The guided denoiser that `cfg_zero` makes."""

    denoiser: Any
    target: str = static("velocity")

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The pair (s* bad, good), s* = <good, bad> / |bad|^2."""
        bad, good = (to_target(self.target, self.schedule, p, t) for p in (pair.bad, pair.good))

        def scale(b: Array, g: Array) -> Array:
            return safe_ratio(sum_dims(g * b), sum_dims(b * b)) * b

        value = jax.tree.map(scale, bad, good)
        scaled = from_target(self.target, self.schedule, value, x, t, pair.bad)
        return self.denoiser.guide(x, t, pair._replace(bad=scaled))


@struct
class ZeroInit(Guided):
    """The denoiser that `zero_init` makes."""

    denoiser: Any
    share: Array | float

    def __call__(self, x: PyTree, t: Array, cond: PyTree = None) -> Prediction:
        """The wrapped prediction, or that of velocity 0."""
        t = broadcast_time(t, x)
        schedule = schedule_of(self.denoiser)
        s = first(schedule)
        still = t > s.t_max - self.share * (s.t_max - s.t_data)
        prediction = self.denoiser(x, t, cond)
        zero = jax.tree.map(jnp.zeros_like, prediction.x0)
        rest = from_target("velocity", schedule, zero, x, t, prediction)
        return jax.tree.map(lambda a, b: jnp.where(expand(still, a), a, b), rest, prediction)


def cfg_zero(denoise: Any, target: str = "velocity") -> CFGZero:
    """s* bad + w (good - s* bad) on the velocity, s* = <good, bad> / |bad|^2.

    s* is the best multiple of the unconditional velocity for the conditional one, per sample and
    leaf. w = 1 is the conditional model. The paper's other half is `zero_init`.

    Args:
      denoise: a guidance that extrapolates (cfg, ...).
      target: the space of the inner product: "velocity", "v", "x0", "eps" or "score".

    Raises:
      UserError: nothing to refine, no schedule, or an unknown target.

    >>> guided = guidance.zero_init(guidance.cfg_zero(guidance.cfg(denoise, 4.0, null)), 0.04)
    """
    refinable("cfg_zero", denoise)
    check_target("cfg_zero", target, schedule_of(denoise, where="cfg_zero"))
    return CFGZero(denoise, target)


def zero_init(denoise: Any, share: Array | float = 0.04) -> ZeroInit:
    """Velocity 0 while t is above (1 - share) t_max: x stays where it is.

    For networks whose velocity at pure noise is worse than none. On a grid uniform in t, the first
    K of n steps stand still with share = (K - 0.5) / n. An Euler or DDIM step then does not move on
    rectified flow, where velocity 0 is x0 = eps = x.

    Raises:
      UserError: a share outside [0, 1], no schedule, or one whose data is not at a finite t.
    """
    denoise = as_denoiser(denoise)
    if isinstance(share, int | float) and not 0 <= share <= 1:
        raise UserError(f"zero_init: share={share} given; it lies in [0, 1].")
    finite_data("zero_init", first(schedule_of(denoise, where="zero_init")))
    return ZeroInit(denoise, share)
