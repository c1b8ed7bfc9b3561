"""Equal blocks stacked along their weights and scanned: compile time does not grow with depth."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from jdiff.models.initializers import Unseeded
from jdiff.models.layers import run
from jdiff.pytree import PyTree

#: What changes a layer before it runs: module -> module.
Change = Callable[[nnx.Module], nnx.Module]


def stack(build: Callable[..., nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules of `build(rngs=...)` as one whose weights have a leading axis [depth]."""
    if abstract := isinstance(rngs, Unseeded):
        blocks = build(rngs=rngs)
    else:
        blocks = nnx.vmap(lambda rngs: build(rngs=rngs))(rngs.split(depth))
    blocks.stacked = depth
    for _, variable in nnx.to_flat_state(nnx.state(blocks)):
        if abstract:
            value = variable.get_value()
            variable.set_value(np.broadcast_to(value, (depth, *value.shape)))
        if axes := variable.get_metadata().get("axes"):
            variable.set_metadata("axes", ("layers", *axes))
    return blocks


def repeated(
    block: Callable[..., nnx.Module], depth: int, *, scan: bool, rngs: nnx.Rngs
) -> nnx.Module:
    """`depth` blocks of `block(rngs=...)`: stacked to be scanned if `scan`, else a list."""
    if scan and depth:
        return stack(block, depth, rngs)
    return nnx.List([block(rngs=rngs) for _ in range(depth)])


class Varied:
    """Stacked blocks of which some layers are changed; the weights stay as they are.

    Attributes:
        blocks: what `stack` made.
        changes: for each layer, what is done to it before it runs.
    """

    def __init__(self, blocks: nnx.Module):
        self.blocks = blocks
        self.changes: list[list[Change]] = [[] for _ in range(blocks.stacked)]


def scan(
    blocks: nnx.Module | Varied, h: PyTree, *inputs: jax.Array | None, remat: bool | str
) -> PyTree:
    """h through all layers: `h = layer(h, *inputs)`, one after the other.

    Layers that are changed alike share one compiled body; a switch picks it.
    """
    return _through(blocks, h, (), inputs, remat, lambda h: None)[0]


def scan_down(
    blocks: nnx.Module | Varied, h: jax.Array, *inputs: jax.Array | None, remat: bool | str
) -> tuple[jax.Array, jax.Array]:
    """As `scan`; h after the last layer, and after each one, `[depth, ...]`."""
    return _through(blocks, h, (), inputs, remat, lambda h: h)


def scan_up(
    blocks: nnx.Module | Varied,
    h: jax.Array,
    skips: jax.Array,
    *inputs: jax.Array | None,
    remat: bool | str,
) -> jax.Array:
    """As `scan`, with an input of each layer's own: `h = layer(h, skips[i], *inputs)`."""
    return _through(blocks, h, (skips,), inputs, remat, lambda h: None)[0]


def _through(
    blocks: nnx.Module | Varied,
    h: PyTree,
    each: tuple,
    inputs: tuple,
    remat: bool | str,
    kept: Callable[[PyTree], PyTree],
) -> tuple[PyTree, PyTree]:
    """h after the last layer, and what is kept of it after each one."""
    varied = blocks if isinstance(blocks, Varied) else Varied(blocks)
    graphdef, weights = nnx.split(varied.blocks)
    versions: list[list[Change]] = []
    for changes in varied.changes:
        if changes not in versions:
            versions.append(changes)

    def call(changes: list[Change], h: PyTree, weights: nnx.State, own: tuple) -> PyTree:
        block = nnx.merge(graphdef, weights)
        for change in changes:
            block = change(block)
        return run(block, h, *own, *inputs, remat=remat, scanned=True)

    calls = [functools.partial(call, changes) for changes in versions]
    which = (
        None
        if len(calls) == 1
        else np.array([versions.index(changes) for changes in varied.changes])
    )

    def body(h: PyTree, layer: tuple) -> tuple[PyTree, PyTree]:
        number, weights, own = layer
        if len(calls) == 1:
            h = calls[0](h, weights, own)
        else:
            h = jax.lax.switch(number, calls, h, weights, own)
        return h, kept(h)

    return jax.lax.scan(body, h, (which, weights, each))
