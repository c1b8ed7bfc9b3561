"""How far two trees of samples are apart: `[B]`, summed over all dimensions of all leaves."""

import jax
import jax.numpy as jnp

from jdiff.pytree import Array, PyTree


def squared(a: PyTree, b: PyTree) -> Array:
    """||a - b||^2 `[B]`, in float32 or better."""

    def leaf(a: Array, b: Array) -> Array:
        gap = a.astype(jnp.promote_types(a.dtype, jnp.float32)) - b
        return jnp.square(gap).reshape(len(gap), -1).sum(1)

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)))


def dimensions(x: PyTree) -> int:
    """How many numbers one sample of x has."""
    return sum(leaf[0].size for leaf in jax.tree.leaves(x))


def pseudo_huber(a: PyTree, b: PyTree, scale: float) -> Array:
    """sqrt(||a - b||^2 + c^2) - c `[B]` with c = scale sqrt(d) for d dimensions.

    Song and Dhariwal 2023 (iCT), table 1; their scale is 0.00054. Between ||a - b|| for large
    errors and its square over 2 c for small ones; smooth at 0.
    """
    c = scale * dimensions(a) ** 0.5
    square = squared(a, b)
    # sqrt(q + c^2) - c without the cancellation
    return square / (jnp.sqrt(square + c**2) + c)
