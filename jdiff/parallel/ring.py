"""Ring attention: keys and values go round the devices that a sequence is split over.

Liu et al. 2023 (2310.01889). Each device keeps its queries. In every turn it looks at the keys and
values that lie with it, a block at a time (`blockwise`), and hands them on. No device ever holds
all keys; the backward pass sends them round once more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jdiff.errors import positive
from jdiff.parallel import blockwise
from jdiff.parallel.layout import Layout
from jdiff.parallel.shards import Shards, shards
from jdiff.pytree import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Ring:
    """An attention kernel (`models.attention.Kernel`) for tokens that a layout splits."""

    layout: Layout
    block: int

    def __call__(self, q: Array, k: Array, v: Array, *, mask: Array | None = None) -> Array:
        """softmax(q k / sqrt(D)) v; q `[B, *grid, heads, D]`, k and v `[B, *places, heads, D]`."""
        flat = [a.reshape(len(a), -1, *a.shape[-2:]) for a in (q, k, v)]
        laid = shards(self.layout, "ring", *flat[:2])
        return _attend(laid, self.block, *flat, mask).reshape(q.shape)


def ring(layout: Layout, block: int = blockwise.BLOCK) -> Ring:
    """Ring attention over the mesh axes that `layout` splits "tokens" over.

    Exact, on any number of devices, whatever the heads. A device sends its keys and values round
    once forward, and once more, with their gradients, backward. There are no forward-mode
    derivatives (`jax.jvp`, as MeanFlow's loss takes): `all_to_all` can have them.

    Args:
      layout: of the network, as in `apply.with_layout(layout).with_attention(ring(layout))`.
      block: keys that a device looks at at a time, at most: the memory of its maps.

    Raises:
      UserError: when called, if the tokens do not divide over the devices.
    """
    positive("ring", block=block)
    return Ring(layout, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(laid: Shards, block: int, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _forward(laid, block, q, k, v, mask)[0]


def _forward(
    laid: Shards, block: int, q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[Array, tuple]:
    outs = laid.places, laid.numbers, laid.numbers
    body = functools.partial(_look, laid, block)
    out, top, total = _on_each(laid, body, (laid.places,) * 3, outs, mask)(q, k, v)
    return out, (q, k, v, mask, out, top, total)


def _backward(laid: Shards, block: int, kept: tuple, slope: Array) -> tuple:
    q, k, v, mask, out, top, total = kept
    body = functools.partial(_look_back, laid, block)
    ins = (laid.places,) * 5 + (laid.numbers,) * 2
    call = _on_each(laid, body, ins, (laid.places,) * 3, mask)
    return *call(q, k, v, out, slope, top, total), None


_attend.defvjp(_forward, _backward)


def _on_each(laid: Shards, body, ins: tuple, outs: tuple, mask: Array | None):
    """`body(mask, *parts)` on every device."""
    call = jax.shard_map(
        body, mesh=laid.mesh, in_specs=(laid.mask(mask), *ins), out_specs=outs, check_vma=False
    )
    return functools.partial(call, mask)


def _look(
    laid: Shards, block: int, mask: Array | None, q: Array, k: Array, v: Array
) -> tuple[Array, Array, Array]:
    """One device's queries over all keys, and the two numbers that its softmax is known by."""
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))

    def turn(seen: blockwise.Seen, part: tuple, owner: Array) -> tuple[blockwise.Seen, tuple]:
        return blockwise.look(q, seen, *part, _of(mask, owner, laid.count), block), ()

    seen, _ = _round(laid, turn, blockwise.nothing(q), (k, v), ())
    return seen.mean().astype(q.dtype).swapaxes(1, 2), seen.top, seen.total


def _look_back(
    laid: Shards, block: int, mask: Array | None, q: Array, k: Array, v: Array, out: Array,
    slope: Array, top: Array, total: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The gradients by one device's queries, keys and values."""
    kinds = q.dtype, k.dtype, v.dtype
    q, k, v, out, slope = (a.swapaxes(1, 2) for a in (q, k, v, out, slope))
    asked = blockwise.asked(q, out, slope, top, total)

    def turn(dq: Array, part: tuple, owner: Array) -> tuple[Array, tuple]:
        return blockwise.look_back(asked, dq, *part, _of(mask, owner, laid.count), block)

    dq, *sums = (jnp.zeros(a.shape, asked.mean.dtype) for a in (q, k, v))
    dq, (dk, dv) = _round(laid, turn, dq, (k, v), tuple(sums))
    return tuple(a.swapaxes(1, 2).astype(kind) for a, kind in zip((dq, dk, dv), kinds))


def _round(laid: Shards, turn, state: PyTree, part: tuple, sums: tuple) -> tuple[PyTree, tuple]:
    """`state, more = turn(state, part, owner)` for every device's part, the device's own first.

    `sums`, to which `more` is added, go round with the part that they belong to, and come home.
    Parts are handed on while the device is busy with them.
    """
    if laid.count == 1:
        return turn(state, part, 0)
    me = jax.lax.axis_index(laid.tokens)
    hand_on = functools.partial(
        jax.lax.ppermute, axis_name=laid.tokens,
        perm=[(i, (i + 1) % laid.count) for i in range(laid.count)],
    )  # fmt: skip

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        state, part, sums = carry
        following = hand_on(part)
        state, more = turn(state, part, (me - number) % laid.count)
        sums = jax.tree.map(jnp.add, sums, more)
        return (state, following, hand_on(sums) if sums else sums), None

    (state, part, sums), _ = jax.lax.scan(step, (state, part, sums), jnp.arange(laid.count - 1))
    state, more = turn(state, part, (me + 1) % laid.count)
    sums = jax.tree.map(jnp.add, sums, more)
    return state, hand_on(sums) if sums else sums


def _of(mask: Array | None, owner: Array, count: int) -> Array | None:
    """The columns of the mask that are the keys of `owner`."""
    if mask is None:
        return None
    size = mask.shape[-1] // count
    return jax.lax.dynamic_slice_in_dim(mask, owner * size, size, axis=-1)
