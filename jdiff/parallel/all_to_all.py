"""All-to-all attention: split tokens are exchanged for split heads, and back.

Jacobs et al. 2023 (DeepSpeed-Ulysses, 2309.14509). Each device gets all tokens of some of its
heads, runs any kernel on them, and gives the result back. Four exchanges of an activation's size,
however many devices there are; a ring moves as much in every turn.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from jdiff.errors import UserError
from jdiff.parallel.blockwise import blockwise
from jdiff.parallel.layout import Layout
from jdiff.parallel.shards import Shards, nearest, shards
from jdiff.pytree import Array

P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """An attention kernel (`models.attention.Kernel`) for tokens that a layout splits."""

    layout: Layout
    kernel: Callable[..., Array]

    def __call__(self, q: Array, k: Array, v: Array, *, mask: Array | None = None) -> Array:
        """softmax(q k / sqrt(D)) v; q `[B, *grid, heads, D]`, k and v `[B, *places, heads, D]`."""
        flat = [a.reshape(len(a), -1, *a.shape[-2:]) for a in (q, k, v)]
        laid = shards(self.layout, "all_to_all", *flat[:2])
        heads, over = q.shape[-2], laid.count * laid.over_heads
        if heads % over:
            raise UserError(
                f"attention 'all_to_all': {heads} heads do not divide over {over} devices "
                f"(mesh.{' x mesh.'.join((*laid.heads, *laid.tokens))}); {nearest(heads, over)}. "
                "Attention 'ring' takes any number of heads."
            )

        def body(mask: Array | None, *parts: Array) -> Array:
            masked = {} if mask is None else {"mask": mask}
            if laid.count == 1:
                return self.kernel(*parts, **masked)
            exchange = functools.partial(jax.lax.all_to_all, axis_name=laid.tokens, tiled=True)
            whole = (exchange(a, split_axis=2, concat_axis=1) for a in parts)
            return exchange(self.kernel(*whole, **masked), split_axis=1, concat_axis=2)

        ins = (_of_mask(laid, mask), *(laid.places,) * 3)
        call = jax.shard_map(
            body, mesh=laid.mesh, in_specs=ins, out_specs=laid.places, check_vma=False
        )
        return call(mask, *flat).reshape(q.shape)


def all_to_all(layout: Layout, kernel: Callable[..., Array] = blockwise) -> AllToAll:
    """`kernel` on whole sequences of split heads, over the mesh axes that split "tokens".

    Where only heads or the batch are split it runs `kernel` on each device's own: kernels that the
    compiler cannot split (cuDNN's, Pallas's, a loop over heads) are put in by it, too.

    Args:
      layout: of the network, as in `apply.with_layout(layout).with_attention(...)`.
      kernel: what attends (`models.attention.Kernel`). The default's memory grows linearly with
        the sequence; `models.attention.by_head` has forward-mode derivatives.

    Raises:
      UserError: when called, if the tokens or the heads do not divide over the devices.
    """
    return AllToAll(layout, kernel)


def _of_mask(laid: Shards, mask: Array | None) -> P | None:
    """Heads as after the exchange, all else whole but the batch."""
    if mask is None:
        return None
    rows = laid.rows if mask.shape[0] > 1 else None
    return P(rows, (*laid.heads, *laid.tokens) if mask.shape[1] > 1 else None)
