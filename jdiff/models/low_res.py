"""A small image as a condition: enlarged to the size of the noisy one and set behind its channels.

Cascades generate so (Ho et al. 2022, CDM; ADM's upsamplers; Imagen's super-resolution networks).
The network enlarges its input itself, so that training and sampling cannot differ in it.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.errors import UserError, choose
from jdiff.models.layers import entry

#: How a small image may be enlarged, and what jax calls it.
METHODS = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}


def enlarge(small: jax.Array, shape: Sequence[int], method: str = "bilinear") -> jax.Array:
    """`[..., h, w, C]` to `[..., H, W, C]`, by any factor and each axis by its own.

    Pixels are areas: the centre of output pixel i lies at (i + 1/2) h / H of the input (PyTorch's
    align_corners=False). Beyond the border centres the weights of the pixels that are there are
    scaled to sum 1.

    Args:
        small: a float image, in any range; "bicubic" may leave the range.
        shape: (H, W), or (H, W, C), of which C is not looked at.
        method: "bilinear"; "bicubic", Keys' cubic convolution with a = -1/2, which keeps linear
            ramps (as Pillow, TensorFlow and PyTorch's antialias=True have it; PyTorch's default
            has a = -3/4 and bends them); "nearest", PyTorch's "nearest-exact".

    Raises:
        UserError: another method, or a smaller shape.
    """
    jax_name = METHODS[choose("low_res_method", method, METHODS)]
    if any(now > then for now, then in zip(small.shape[-3:-1], shape)):
        raise UserError(
            f"enlarge: an image of {small.shape[-3]} x {small.shape[-2]} pixels cannot be enlarged "
            f"to {shape[0]} x {shape[1]}."
        )
    size = (*small.shape[:-3], *shape[:2], small.shape[-1])
    # Nothing is made smaller, so there is nothing to antialias.
    return jax.image.resize(small, size, method=jax_name, antialias=False)


def with_low_res(
    network: nnx.Module,
    x: jax.Array,
    cond: Mapping[str, jax.Array],
    channels: int,
    method: str = "bilinear",
) -> jax.Array:
    """x `[B, H, W, C]` and cond["low_res"] `[B, h, w, channels]`: `[B, H, W, C + channels]`.

    With `channels` 0 there is no condition, and x is returned. The small image is enlarged in its
    own dtype.

    Raises:
        ValueError: if the entry is missing, has another shape, or is larger than x.
    """
    if not channels:
        return x
    small = entry(network, cond, "low_res", (x.shape[0], "h", "w", channels))
    large = enlarge(small, x.shape[1:3], method)
    return jnp.concatenate([x, large.astype(x.dtype)], axis=-1)
