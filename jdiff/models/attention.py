"""Attention as a module without parameters: the one place where a network's attention is changed.

A network projects its own queries, keys and values and hands them to an `Attention`, whose `kernel`
does the rest. Guidance that perturbs attention, editing that injects maps, and adapters that add
keys replace this module (`jdiff.models.replace`); the parameters around it do not move. A faster
kernel is put in the same way: `apply.with_attention("cudnn")`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.models.module import Module
from jdiff.parallel.shards import nearest
from jdiff.parallel.tokens import parts

#: (q `[B, *grid, heads, D]`, k and v `[B, *places, heads, D]`) -> like q. Where the network masks
#: places it also gets mask=, bool `[B, 1 or heads, 1 or queries, places]`, True where to look.
Kernel = Callable[..., jax.Array]


def dot_product(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / sqrt(D)) v over all places, softmax in float32: the usual kernel.

    Heads come first and the softmax divides after the product with v, where there is less to
    divide: on CPU twice as fast as `jax.nn.dot_product_attention` (benchmarks/kernels.py).
    """
    heads_first = (_flat(a).swapaxes(1, 2) for a in (q, k, v))
    return _softmax_product(*heads_first, mask).swapaxes(1, 2).reshape(q.shape)


def by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """The same, one head after the other, whose maps are computed again in the backward pass.

    The maps of one head are all that is in memory at a time. On CPU it is the fastest from about
    1,000 tokens on, where the maps of all heads leave the cache.
    """
    heads = q.shape[-2]
    # A head is an axis of size one, so that a mask broadcasts as it does over all.
    split = [jnp.moveaxis(_flat(a), 2, 0)[:, :, None] for a in (q, k, v)]
    own = mask is not None and mask.shape[1] == heads > 1
    if own:
        split.append(jnp.moveaxis(mask, 1, 0)[:, :, None])

    def attend(parts: list[jax.Array]) -> jax.Array:
        return _softmax_product(*parts[:3], parts[3] if own else mask)

    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), split)
    return jnp.moveaxis(out[:, :, 0], 0, 2).reshape(q.shape)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """cuDNN's fused attention, on NVIDIA GPUs: the maps are never in memory.

    No forward-mode derivatives (`jax.jvp`, as MeanFlow's loss takes).

    Raises:
        UserError: if the activations are neither bfloat16 nor float16.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention kernel 'cudnn' takes bfloat16 or float16, not {q.dtype}: build the "
            "network with dtype='bfloat16', or use the kernel 'xla'."
        )
    attend = jax.nn.dot_product_attention
    return attend(*map(_flat, (q, k, v)), mask=mask, implementation="cudnn").reshape(q.shape)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """tokamax's attention: the fastest of its Pallas kernels that the device has.

    Raises:
        UserError: if tokamax is not installed.
    """
    try:
        import tokamax
    except ImportError as error:
        raise UserError("attention kernel 'flash' needs tokamax: pip install tokamax") from error
    return tokamax.dot_product_attention(*map(_flat, (q, k, v)), mask=mask).reshape(q.shape)


#: Kernels by name, as `apply.with_attention` takes them.
KERNELS: Mapping[str, Kernel] = {
    "xla": dot_product,
    "by_head": by_head,
    "cudnn": cudnn,
    "flash": flash,
}


def named_kernel(kernel: Kernel | str) -> Kernel:
    """The kernel of that name, or the kernel itself.

    Raises:
        UserError: for a name not in `KERNELS`, with the nearest.
    """
    if isinstance(kernel, str):
        return KERNELS[choose("attention kernel", kernel, KERNELS)]
    return kernel


def _flat(a: jax.Array) -> jax.Array:
    """`[B, *places, heads, D]` with the places in one axis."""
    return a.reshape(a.shape[0], -1, *a.shape[-2:])


def _softmax_product(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k / sqrt(D)) v of `[B, heads, places, D]`, in float32 at least until the end."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=wide)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    # The softmax is the same whatever is subtracted, so the subtraction has no derivative.
    above = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(above / math.sqrt(q.shape[-1]))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, v, preferred_element_type=wide) / total
    return out.astype(q.dtype)


class Attention(Module):
    """Attention of queries `[B, *grid, C]` to keys and values `[B, *places, C]`, in `heads` heads.

    Each head has C / heads neighbouring channels. The axes of the grid (tokens, or rows and columns
    of an image) are kept for kernels that look at the neighbourhood.
    """

    def __init__(self, heads: int, kernel: Kernel = dot_product):
        self.heads, self.kernel = heads, kernel

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """What each query receives: `[B, *grid, C]`; places where `mask` is False are not seen.

        Raises:
            UserError: if the layout splits heads over a number of devices that does not divide
                them.
        """
        over = parts("heads")
        if self.heads % over:
            raise UserError(
                f"mesh.tensor={over}: {self.heads} heads do not divide over {over} devices; "
                f"{nearest(self.heads, over)}."
            )
        split = (a.reshape(*a.shape[:-1], self.heads, -1) for a in (q, k, v))
        masked = {} if mask is None else {"mask": mask}
        return self.kernel(*split, **masked).reshape(q.shape)
