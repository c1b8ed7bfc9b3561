"""Attention as a module without parameters: the one place where a network's attention is changed.

A network projects its own queries, keys and values and hands them to an `Attention`, whose `kernel`
does the rest. Guidance that perturbs attention, editing that injects maps, and adapters that add
keys replace this module (`jdiff.models.replace`); the parameters around it do not move.
"""

from collections.abc import Callable

import jax
from flax import nnx

#: (q `[B, *grid, heads, D]`, k and v `[B, *places, heads, D]`) -> like q. Where the network masks
#: places it also gets mask=, bool `[B, 1 or heads, 1 or queries, places]`, True where to look.
Kernel = Callable[..., jax.Array]


def dot_product(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / sqrt(D)) v over all places, softmax in float32: the usual kernel."""
    flat = (a.reshape(a.shape[0], -1, *a.shape[-2:]) for a in (q, k, v))
    return jax.nn.dot_product_attention(*flat, mask=mask).reshape(q.shape)


class Attention(nnx.Module):
    """Attention of queries `[B, *grid, C]` to keys and values `[B, *places, C]`, in `heads` heads.

    Each head has C / heads neighbouring channels. The axes of the grid (tokens, or rows and columns
    of an image) are kept for kernels that look at the neighbourhood.
    """

    def __init__(self, heads: int, kernel: Kernel = dot_product):
        self.heads, self.kernel = heads, kernel

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """What each query receives: `[B, *grid, C]`; places where `mask` is False are not seen."""
        split = (a.reshape(*a.shape[:-1], self.heads, -1) for a in (q, k, v))
        masked = {} if mask is None else {"mask": mask}
        return self.kernel(*split, **masked).reshape(q.shape)
