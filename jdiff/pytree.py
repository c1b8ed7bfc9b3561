"""Frozen dataclasses that are pytrees, and the few tree operations the ground floor is built from.

A `struct` is data that jit takes as an argument: numbers and arrays are leaves, so new weights or a
new guidance scale never recompile; fields marked `static()` are structure, so a new value does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp

from jdiff.errors import UserError

Array = jax.Array
PyTree = Any


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a `struct` that is structure, not data: hashable, and a new value recompiles."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def struct(cls: type) -> type:
    """Makes a class a frozen dataclass that is a pytree (see the module's docstring)."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    meta = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    data = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in data]

    def flatten(x: Any) -> tuple[list, tuple]:
        return [getattr(x, name) for name in data], tuple([getattr(x, name) for name in meta])

    def flatten_with_keys(x: Any) -> tuple[list, tuple]:
        children, aux = flatten(x)
        return list(zip(keys, children)), aux

    def unflatten(aux: tuple, children: Any) -> Any:
        x = object.__new__(cls)  # whatever tree.map puts in, without the constructor
        for name, value in zip(data, children):
            object.__setattr__(x, name, value)
        for name, value in zip(meta, aux):
            object.__setattr__(x, name, value)
        return x

    # Not jax.tree_util.register_dataclass: structures that it makes compare equal whatever their
    # type (jax 0.10 and 0.11), so that jit now and then runs the program of another solver.
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def is_concrete(tree: PyTree) -> bool:
    """Whether every leaf has a value now, so that it can be checked; False under jit or vmap."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def expand(a: Array, like: Array) -> Array:
    """Gives a scalar or `[B]` array trailing axes of size one, to broadcast against `[B, ...]`."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim)) if a.ndim else a


def batch_size(x: PyTree) -> int:
    """The length of the leading axis of the first leaf of x."""
    return jax.tree.leaves(x)[0].shape[0]


def broadcast_time(t: Array, x: PyTree) -> Array:
    """A scalar time as the `[B]` that a denoiser takes; a `[B]` time is returned as it is."""
    return jnp.broadcast_to(jnp.asarray(t), (batch_size(x),))


def noise_like(keys: Array, x: PyTree) -> PyTree:
    """Standard normal noise of x's shapes and dtypes, each sample's drawn from its own key.

    Args:
      keys: `[B]` keys, one a sample.
      x: a tree of arrays (or shape structs) `[B, ...]`.
    """
    leaves, treedef = jax.tree.flatten(x)

    def draw(index: int, leaf: Array) -> Array:
        def one(key: Array) -> Array:
            key = jax.random.fold_in(key, index) if len(leaves) > 1 else key
            return jax.random.normal(key, leaf.shape[1:], leaf.dtype)

        return jax.vmap(one)(keys)

    return treedef.unflatten([draw(i, leaf) for i, leaf in enumerate(leaves)])


def stack(trees: list[PyTree]) -> PyTree:
    """Joins trees of `[B, ...]` into `[B * n, ...]` with each sample's n members side by side.

    Neighbours stay on one device when the batch is sharded; `unstack` undoes it.
    """

    def join(*leaves: Array) -> Array:
        joined = jnp.stack(leaves, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *trees)


def unstack(tree: PyTree, n: int) -> list[PyTree]:
    """The n trees that `stack` joined."""
    split = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]), tree)
    return [jax.tree.map(lambda a, i=i: a[:, i], split) for i in range(n)]


def prefix_map(
    fn: Callable[..., Any], prefix: PyTree, is_leaf: Callable[[Any], bool], x: PyTree, *rest: PyTree
) -> PyTree:
    """Maps `fn(p, x_leaf, *rest_leaves)` over x, where `prefix` has one p a leaf or subtree of x.

    Raises:
      UserError: `prefix` is not a prefix of x, or the trees of `rest` differ from x.
    """
    leaves, treedef = jax.tree.flatten(x)
    owners: list[Any] = []
    try:
        jax.tree.map(
            lambda p, sub: owners.extend([p] * len(jax.tree.leaves(sub))),
            prefix, x, is_leaf=is_leaf,
        )  # fmt: skip
        others = [treedef.flatten_up_to(r) for r in rest]
    except ValueError as error:
        given = ", ".join(f"{_names(a)}" for a in (x, *rest))
        raise UserError(
            f"the trees do not match: the schedule has {_names(prefix, is_leaf)}, the arrays that "
            f"it serves have {given}."
        ) from error
    return treedef.unflatten([fn(*args) for args in zip(owners, leaves, *others)])


def _names(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> str:
    """The paths of a tree's leaves, for an error."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return f"({', '.join(jax.tree_util.keystr(path) or 'one leaf' for path, _ in paths)})"
