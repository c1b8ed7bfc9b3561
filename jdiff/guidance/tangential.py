"""Tangential damping classifier-free guidance (Kwon et al. 2025, 2503.18137)."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.denoisers import schedule_of
from jdiff.guidance.base import (
    Pair,
    Refinement,
    check_target,
    from_target,
    refinable,
    sum_dims,
    to_target,
)
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, static, struct


@struct
class Tangential(Refinement):
    """The guided denoiser that `tangential` makes."""

    denoiser: Any
    target: str = static("v")

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The pair whose bad member is projected on the direction the two share."""
        bad, good = (to_target(self.target, self.schedule, p, t) for p in (pair.bad, pair.good))
        value = jax.tree.map(shared, bad, good)
        damped = from_target(self.target, self.schedule, value, x, t, pair.bad)
        return self.denoiser.guide(x, t, pair._replace(bad=damped))


def shared(bad: Array, good: Array) -> Array:
    """`bad` projected on the leading right singular vector of the rows (good, bad), per sample.

    With the rows' Gram matrix and its leading eigenvector (cos a, sin a), that vector is (cos a
    good + sin a bad) / s and the projection of bad sin a (cos a good + sin a bad): no SVD.
    """
    gg, gb, bb = sum_dims(good * good), sum_dims(good * bad), sum_dims(bad * bad)
    a = 0.5 * jnp.arctan2(2.0 * gb, gg - bb)
    return jnp.sin(a) * (jnp.cos(a) * good + jnp.sin(a) * bad)


def tangential(denoise: Any, target: str = "v") -> Tangential:
    """Takes from the unconditional prediction what it does not share with the conditional one.

    Both are rows of a matrix; the unconditional one is projected on the leading right singular
    vector, per sample and leaf. Where the two agree nothing changes; w = 1 is the conditional
    model.

    Args:
      denoise: a guidance that extrapolates (cfg, ...).
      target: the space of the projection: "v", "velocity", "x0", "eps" or "score". The paper's is
        the score of an eps-network ("eps"), which has no x0 at alpha = 0.

    Raises:
      UserError: nothing to refine, no schedule, an unknown target, or "eps" on a schedule that
        starts at alpha = 0.
    """
    refinable("tangential", denoise)
    check_target("tangential", target, schedule_of(denoise, where="tangential"))
    return Tangential(denoise, target)
