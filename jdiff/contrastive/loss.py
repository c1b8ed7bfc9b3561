"""The symmetric InfoNCE loss and its learned temperature (Radford et al. 2021, section 2.3)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jdiff.pytree import Array, PyTree

#: Where the temperature starts and the most that the logits may be scaled by (section 2.5).
SCALE, LIMIT = 1 / 0.07, 100.0


def info_nce(
    images: Array, texts: Array, scale: Array | float,
    constrain: Callable[[Array], Array] = lambda logits: logits,
) -> Array:  # fmt: skip
    """Cross-entropy of finding each image's text among all, and each text's image: `[N]`.

    With logits l_ij = scale <image_i, text_j> it is, of pair i,

        (log sum_j exp l_ij + log sum_j exp l_ji) / 2 - l_ii,

    figure 3 of Radford et al. 2021 (2103.00020). All pairs of the batch are each other's
    negatives, wherever their arrays lie: of equal logits the loss is log N. In float32 at least.

    Args:
      images, texts: `[N, D]`, of unit length; row i of one belongs to row i of the other.
      scale: 1 / temperature.
      constrain: lays out the logits `[N, N]` over devices.
    """
    wide = jnp.promote_types(jnp.result_type(images, texts), jnp.float32)
    images, texts = images.astype(wide), texts.astype(wide)
    precise = jax.lax.Precision.HIGHEST  # a logit is up to 100 cosines
    logits = constrain(scale * jnp.matmul(images, texts.T, precision=precise))
    lse = jax.nn.logsumexp
    return (lse(logits, axis=1) + lse(logits, axis=0)) / 2 - jnp.diagonal(logits)


def unit(x: Array) -> Array:
    """x `[..., D]` in float32 at least, divided by its length (by 1e-6 if that is less)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def limited(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser, after each step of which params["log_scale"] is at most log 100.

    Clipped as a parameter, as published, and not inside the loss, where the gradient would vanish
    beyond the limit and the temperature never come back.
    """

    def update(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(grads, state, params)
        before = params["log_scale"]
        most = jnp.asarray(math.log(LIMIT), before.dtype) - before
        return updates | {"log_scale": jnp.minimum(updates["log_scale"], most)}, state

    return optax.GradientTransformation(optimizer.init, update)
