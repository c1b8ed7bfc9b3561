"""Attention to a block of keys at a time, whose maps are never kept: the memory of long sequences.

The softmax is put together as blocks come by (Milakov and Gimelshein 2018), and the backward pass
computes the maps again from two numbers a query, as FlashAttention does (Dao et al. 2022, algorithm
4). In jax's own operations, on any device. Inside, heads come before tokens: `[B, heads, N, D]`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.pytree import Array, PyTree

#: Keys that are looked at at a time, at most.
BLOCK = 1024


def blockwise(q: Array, k: Array, v: Array, *, mask: Array | None = None) -> Array:
    """softmax(q k / sqrt(D)) v over all places, a kernel as `models.attention.Kernel`.

    No forward-mode derivatives (`jax.jvp`, as MeanFlow's loss takes).
    """
    flat = (a.reshape(len(a), -1, *a.shape[-2:]).swapaxes(1, 2) for a in (q, k, v))
    return _attend(BLOCK, *flat, mask).swapaxes(1, 2).reshape(q.shape)


class Seen(NamedTuple):
    """Of each query, what it has seen so far: the largest logit, weights and weighted values."""

    top: Array  # [B, heads, N]
    total: Array  # [B, heads, N]
    values: Array  # [B, heads, N, D]

    def mean(self) -> Array:
        """What the queries receive."""
        return self.values / self.total[..., None]


class Asked(NamedTuple):
    """Of each query, what its gradient is made from: `top` and `total` are those of all keys."""

    q: Array
    slope: Array  # of the result
    mean: Array  # sum of the weights' slopes times the weights, [B, heads, N, 1]
    top: Array
    total: Array


def nothing(q: Array) -> Seen:
    """Before the first block."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    top = jnp.full(q.shape[:3], jnp.finfo(wide).min, wide)
    return Seen(top, jnp.zeros_like(top), jnp.zeros(q.shape, wide))


def look(q: Array, seen: Seen, k: Array, v: Array, mask: Array | None, block: int) -> Seen:
    """`seen`, and these keys and values."""

    def turn(seen: Seen, part: tuple) -> tuple[Seen, None]:
        k, v, mask = part
        logits = _logits(q, k, mask)
        top = jnp.maximum(seen.top, logits.max(-1))
        weights, before = jnp.exp(logits - top[..., None]), jnp.exp(seen.top - top)
        values = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)
        total = seen.total * before + weights.sum(-1)
        return Seen(top, total, seen.values * before[..., None] + values), None

    return _in_blocks(turn, block, seen, k, v, mask)[0]


def asked(q: Array, out: Array, slope: Array, top: Array, total: Array) -> Asked:
    """What `look_back` needs of the queries."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    mean = (slope.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    return Asked(q, slope, mean, top, total)


def look_back(
    of: Asked, dq: Array, k: Array, v: Array, mask: Array | None, block: int
) -> tuple[Array, tuple[Array, Array]]:
    """`dq` with what these keys and values add, and the gradients by them, in float32 at least."""

    def turn(dq: Array, part: tuple) -> tuple[Array, tuple[Array, Array]]:
        k, v, mask = part
        with jax.named_scope("rematted_computation"):  # as jax.checkpoint calls what it repeats
            logits = _logits(of.q, k, mask)
        weights = jnp.exp(logits - of.top[..., None]) / of.total[..., None]
        change = weights * (_product("bhqd,bhkd->bhqk", of.slope, v) - of.mean)
        if mask is not None:
            change = jnp.where(mask, change, 0)  # of a query that sees nothing, too
        change = (change / math.sqrt(of.q.shape[-1])).astype(of.q.dtype)
        dk = _product("bhqk,bhqd->bhkd", change, of.q)
        dv = _product("bhqk,bhqd->bhkd", weights.astype(of.slope.dtype), of.slope)
        return dq + _product("bhqk,bhkd->bhqd", change, k), (dk, dv)

    return _in_blocks(turn, block, dq, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block: int, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _forward(block, q, k, v, mask)[0]


def _forward(block: int, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple]:
    seen = look(q, nothing(q), k, v, mask, block)
    out = seen.mean().astype(q.dtype)
    return out, (q, k, v, mask, out, seen.top, seen.total)


def _backward(block: int, kept: tuple, slope: Array) -> tuple:
    q, k, v, mask, out, top, total = kept
    of = asked(q, out, slope, top, total)
    dq, (dk, dv) = look_back(of, jnp.zeros(q.shape, of.mean.dtype), k, v, mask, block)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _product(form: str, a: Array, b: Array) -> Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(form, a, b, preferred_element_type=wide)


def _logits(q: Array, k: Array, mask: Array | None) -> Array:
    logits = _product("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def _in_blocks(
    turn, block: int, state: PyTree, k: Array, v: Array, mask: Array | None
) -> tuple[PyTree, PyTree]:
    """`state, out = turn(state, (k, v, mask))` for `block` keys at a time, at most."""
    length = k.shape[2]
    block = next(size for size in range(min(block, length), 0, -1) if length % size == 0)
    if block == length:
        return turn(state, (k, v, mask))

    def cut(a: Array, axis: int) -> Array:
        shape = (*a.shape[:axis], length // block, block, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    each = cut(k, 2), cut(v, 2), None if mask is None else cut(mask, 3)
    state, outs = jax.lax.scan(turn, state, each)
    whole = lambda a: jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], length, *a.shape[4:])
    return state, jax.tree.map(whole, outs)
