"""FSDP's one operation: a weight that lies in parts, whole where a network uses it.

Said as a primitive of its own, and not left to XLA, which might as well leave the weights where
they are and move the activations. Having a name, its result can be left out of what a block keeps
for the backward pass (`models.remat`): the weight is fetched again instead.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jdiff.parallel.layout import current, spec_of, splits
from jdiff.parallel.shardings import of_array
from jdiff.pytree import Array

#: As policies of `jax.checkpoint` see it: `primitive.name`.
NAME = "fetch_weight"


def fetch(weight: Array, names: Sequence[str | None] | None) -> Array:
    """A weight that lies as `of_array` says, whole over the axis "fsdp".

    The gradient goes the same way back: summed over the batch, of which each device keeps its part.
    Without a layout, or where the weight is not split over "fsdp", it is as it was.

    Args:
      names: of its axes; those of a stack if it is one layer of it.
    """
    if names is None or not fetches():
        return weight
    layout = current()
    parts = of_array(weight.shape, tuple(names)[len(names) - weight.ndim :], layout)
    if not splits(parts.spec, "fsdp"):
        return weight
    kept = [None if entry is None else _without(entry) for entry in parts.spec]
    whole = jax.NamedSharding(layout.mesh, spec_of(kept))
    return _fetch.bind(weight, parts=parts, whole=whole)


def fetches() -> bool:
    """Whether the network that is being traced may have weights to fetch."""
    layout = current()
    return layout is not None and layout.mesh.shape["fsdp"] > 1


def _without(entry: str | tuple[str, ...]) -> tuple[str, ...] | None:
    axes = (entry,) if isinstance(entry, str) else entry
    return tuple(axis for axis in axes if axis != "fsdp") or None


_fetch = Primitive(NAME)
_give_back = Primitive("give_back_gradient")


def _computed(w: Array, *, parts: Any, whole: Any) -> Array:
    constrain = jax.lax.with_sharding_constraint
    return constrain(constrain(w, parts), whole)


def _transposed(g: Array, *, parts: Any, whole: Any) -> Array:
    # The sum over devices first: the product that makes g has no other way to split its sum.
    constrain = jax.lax.with_sharding_constraint
    return constrain(constrain(g, whole), parts)


def _batched(primitive: Primitive) -> Any:
    def rule(args: tuple, dims: tuple, *, parts: Any, whole: Any) -> tuple[Array, int]:
        w = jax.numpy.moveaxis(args[0], dims[0], 0)
        more = lambda place: jax.NamedSharding(place.mesh, jax.P(None, *place.spec))
        return primitive.bind(w, parts=more(parts), whole=more(whole)), 0

    return rule


def _define(primitive: Primitive, compute: Any, transposed: Primitive) -> None:
    primitive.def_impl(compute)
    primitive.def_abstract_eval(lambda w, **_: w)
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    ad.deflinear2(primitive, lambda ct, _, **params: [transposed.bind(ct, **params)])
    batching.primitive_batchers[primitive] = _batched(primitive)


_define(_fetch, _computed, _give_back)
_define(_give_back, _transposed, _fetch)
