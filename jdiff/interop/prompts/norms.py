"""Guidance that gives the velocity the norm of the conditional one: Qwen-Image's and Z-Image's."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.guidance.base import (
    Pair,
    Refinement,
    from_target,
    refinable,
    root,
    sum_dims,
    to_target,
)
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, expand, static, struct
from jdiff.solvers.base import safe_ratio


class _Normed(Refinement):
    """A guidance whose velocity is multiplied by `factor`, but for samples with scale 1."""

    denoiser: Any

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The inner result with its velocity rescaled."""
        guided = self.denoiser.guide(x, t, pair)
        made, good = (to_target("velocity", self.schedule, p, t) for p in (guided, pair.good))
        plain = lambda a: expand(pair.w, a) == 1.0  # not guided, so not rescaled either
        ours = lambda m, g: m * jnp.where(plain(m), 1.0, self.factor(m, g))
        value = jax.tree.map(ours, made, good)
        return from_target("velocity", self.schedule, value, x, t, guided)

    def factor(self, made: Array, good: Array) -> Array:
        """Of the guided and the conditional velocity `[B, H, W, C]`, of a shape that fits them."""
        raise NotImplementedError  # abstract


@struct
class Renormed(_Normed):
    """The guided denoiser that `renormed` makes."""

    denoiser: Any
    patch: int = static(2)

    def factor(self, made: Array, good: Array) -> Array:
        """|good| / |made| of each patch `[B, H, W, 1]`."""
        patches = made.shape[0], made.shape[1] // self.patch, made.shape[2] // self.patch
        cut = (*patches[:2], self.patch, patches[2], self.patch, -1)
        norm = lambda a: root(jnp.sum(a.reshape(cut) ** 2, (2, 4, 5)))
        ratio = safe_ratio(norm(good), norm(made))[..., None]
        return jnp.repeat(jnp.repeat(ratio, self.patch, 1), self.patch, 2)


@struct
class Capped(_Normed):
    """The guided denoiser that `capped` makes."""

    denoiser: Any
    most: Array | float = 1.0

    def factor(self, made: Array, good: Array) -> Array:
        """min(1, most |good| / |made|) of each sample `[B, 1, 1, 1]`."""
        norm = lambda a: root(sum_dims(a**2))
        return jnp.minimum(1.0, safe_ratio(expand(self.most, good) * norm(good), norm(made)))


def renormed(denoise: Any, patch: int = 2) -> Renormed:
    """Gives each patch of the guided velocity the norm of the conditional one (Qwen-Image).

    Args:
      denoise: a guidance that extrapolates (cfg, ...), of images `[B, H, W, C]`.
      patch: side of a patch in latent pixels.

    Raises:
      UserError: nothing to refine.
    """
    return Renormed(refinable("renormed", denoise), patch)


def capped(denoise: Any, most: Array | float = 1.0) -> Capped:
    """Keeps each sample's guided velocity within `most` norms of the conditional one (Z-Image).

    Raises:
      UserError: nothing to refine.
    """
    return Capped(refinable("capped", denoise), most)
