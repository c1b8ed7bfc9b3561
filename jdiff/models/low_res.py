"""A small image as a condition: enlarged to the size of the noisy one and set behind its channels.

Cascades generate so (Ho et al. 2022, CDM; ADM's upsamplers; Imagen's super-resolution networks).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models.layers import entry


def with_low_res(
    network: nnx.Module, x: jax.Array, cond: Mapping[str, jax.Array], channels: int
) -> jax.Array:
    """x `[B, H, W, C]` and cond["low_res"] `[B, h, w, channels]`: `[B, H, W, C + channels]`.

    The interpolation is bilinear, with pixels as areas (PyTorch's align_corners=False). With
    `channels` 0 there is no condition, and x is returned.

    Raises:
        ValueError: if the entry is missing or has another shape.
    """
    if not channels:
        return x
    small = entry(network, cond, "low_res", (x.shape[0], "h", "w", channels))
    large = jax.image.resize(small, (*x.shape[:3], channels), method="bilinear")
    return jnp.concatenate([x, large.astype(x.dtype)], axis=-1)
