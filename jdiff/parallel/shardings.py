"""Where each array of a training state lives: a pure function of shapes, names and a layout."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jdiff.parallel.layout import Layout, spec_of, splits
from jdiff.pytree import PyTree

P = jax.sharding.PartitionSpec
#: Smaller arrays stay whole: gathering them costs more than they weigh.
SMALL = 2**12


def of_state(state: PyTree, axes: PyTree, layout: Layout) -> PyTree:
    """The sharding of every leaf of `state`: parameters by their axes, what mirrors them alike.

    A leaf mirrors the parameter whose path its own ends with, if the shapes agree: averages and
    the moments of an optimiser do. What mirrors none (a teacher's weights, factored moments) is
    split over "fsdp" along its largest dimension.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`s; the weights alone, or all of `training.step.State`.
      axes: names of the parameters' axes, from `models.axes`.
    """
    named = {
        _keys(path): names
        for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_names)
    }

    def place(path: tuple, leaf: Any) -> jax.NamedSharding:
        keys = _keys(path)
        for start in range(len(keys)):
            names = named.get(keys[start:])
            if names is not None and len(names) == len(leaf.shape):
                return of_array(leaf.shape, names, layout)
        return of_array(leaf.shape, (None,) * len(leaf.shape), layout)

    return jax.tree_util.tree_map_with_path(place, state)


def of_array(
    shape: Sequence[int], names: Sequence[str | None], layout: Layout
) -> jax.NamedSharding:
    """Split as the layout's rules say and, if they leave "fsdp" free, along the largest dimension.

    Stacked blocks are split as one block is, and never along the dimension "layers": a scan would
    fetch each one from wherever it lies. Arrays below `SMALL` elements are not split over "fsdp".
    """
    if tuple(names[:1]) == ("layers",):
        inner = of_array(shape[1:], names[1:], layout).spec
        return jax.NamedSharding(layout.mesh, P(None, *inner) if any(inner) else P())
    spec = layout.spec(names, shape)
    if math.prod(shape) < SMALL:
        return jax.NamedSharding(layout.mesh, P() if splits(spec, "fsdp") else spec)
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    fsdp = layout.mesh.shape["fsdp"]
    if fsdp > 1 and not splits(spec, "fsdp"):
        free = [d for d, size in enumerate(shape) if entries[d] is None and size % fsdp == 0]
        if free:
            entries[max(free, key=lambda d: shape[d])] = "fsdp"
    return jax.NamedSharding(layout.mesh, spec_of(entries))


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple)
