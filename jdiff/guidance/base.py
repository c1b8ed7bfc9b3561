"""What every guidance shares: the wrapped denoiser, joint calls, and the one extrapolation."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, expand, stack, unstack


class Guided:
    """A denoiser made from another: it carries the schedule of the one inside."""

    denoiser: Any

    @property
    def schedule(self) -> PyTree:
        """The wrapped denoiser's schedule, or None."""
        return getattr(self.denoiser, "schedule", None)


def extrapolate(bad: Prediction, good: Prediction, w: Array) -> Prediction:
    """bad + w (good - bad), in x0 and eps alike; w is a number or `[B]`. float32 or better.

    Both endpoints are affine in one another at fixed x, and the weights sum to one, so guiding x0,
    eps, v or the score is the same thing, and the result is consistent with x.
    """

    def mix(b: Array, g: Array) -> Array:
        dtype = jnp.promote_types(b.dtype, jnp.float32)
        b, g = b.astype(dtype), g.astype(dtype)
        return b + expand(w, b) * (g - b)

    return jax.tree.map(mix, bad, good)


def call_together(denoise: Any, x: PyTree, t: Array, conds: list[PyTree]) -> list[Prediction]:
    """One call of `denoise` under n conditions: `[B * n]`, a sample's members side by side."""
    n = len(conds)
    joint = denoise(stack([x] * n), jnp.repeat(t, n), stack(conds))
    return unstack(joint, n)
