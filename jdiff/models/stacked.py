"""Equal blocks stacked along their weights and scanned: compile time does not grow with depth."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from jdiff.models.layers import run

#: What changes a layer before it runs: module -> module.
Change = Callable[[nnx.Module], nnx.Module]


def stack(build: Callable[..., nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules of `build(rngs=...)` as one whose weights have a leading axis [depth]."""
    blocks = nnx.vmap(lambda rngs: build(rngs=rngs))(rngs.split(depth))
    blocks.stacked = depth
    for _, variable in nnx.to_flat_state(nnx.state(blocks)):
        if axes := variable.get_metadata().get("axes"):
            variable.set_metadata("axes", ("layers", *axes))
    return blocks


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
    blocks: nnx.Module | Varied, h: jax.Array, *inputs: jax.Array, remat: bool | str
) -> jax.Array:
    """h through all layers: `h = layer(h, *inputs)`, one after the other.

    Layers that are changed alike share one compiled body; a switch picks it.
    """
    varied = blocks if isinstance(blocks, Varied) else Varied(blocks)
    graphdef, weights = nnx.split(varied.blocks)
    versions: list[list[Change]] = []
    for changes in varied.changes:
        if changes not in versions:
            versions.append(changes)

    def call(changes: list[Change], h: jax.Array, weights: nnx.State) -> jax.Array:
        block = nnx.merge(graphdef, weights)
        for change in changes:
            block = change(block)
        return run(block, h, *inputs, remat=remat, scanned=True)

    calls = [lambda h, w, changes=changes: call(changes, h, w) for changes in versions]
    if len(calls) == 1:
        return jax.lax.scan(lambda h, w: (calls[0](h, w), None), h, weights)[0]
    which = np.array([versions.index(changes) for changes in varied.changes])

    def body(h: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        return jax.lax.switch(layer[0], calls, h, layer[1]), None

    return jax.lax.scan(body, h, (which, weights))[0]
