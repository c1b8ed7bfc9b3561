"""sweep(): a function over a grid of arguments, as one compiled program.

What varies must be numbers (scales, churns, seeds, keys, the times of grids with one number of
steps), so that one program serves all points; a solver of another kind is another sweep.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError, choose
from jdiff.pytree import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found, and where.

    Iterating gives (point, result) pairs, the last axis fastest.

    Attributes:
      result: what the function returned, with one leading axis for each entry of `axes`.
      axes: the values of each axis as they were given.
    """

    result: PyTree
    axes: dict[str, Sequence[Any]]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], PyTree]]:
        """Every point {name: value} with its result."""
        for index in np.ndindex(*map(len, self.axes.values())):
            point = {name: self.axes[name][i] for name, i in zip(self.axes, index)}
            yield point, jax.tree.map(lambda a, index=index: a[index], self.result)

    def at(self, **point: float) -> PyTree:
        """The results at these coordinates, the nearest value of each; other axes stay whole.

        Raises:
          UserError: no such axis, or one whose values are not numbers.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        for name, value in point.items():
            values = np.asarray(self.axes[choose("sweep axis", name, self.axes)])
            if values.ndim != 1 or not np.issubdtype(values.dtype, np.number):
                raise UserError(f"sweep axis {name!r} holds no numbers; index `result` instead.")
            index[list(self.axes).index(name)] = int(np.argmin(np.abs(values - value)))
        return jax.tree.map(lambda a: a[tuple(index)], self.result)


def sweep(
    fn: Callable[..., PyTree], over: Mapping[str, Any], *,
    fixed: Mapping[str, Any] | None = None, chunk: int | None = None,
) -> Sweep:  # fmt: skip
    """Calls `fn(**point, **fixed)` at every point of the grid that `over` spans, in one program.

    Args:
      fn: a function of keyword arguments that jax can trace, such as `sample`. It is static: the
        same function and sizes reuse the program.
      over: {argument: values}: an array with one entry a point along its first axis, or a list of
        numbers or of pytrees that differ in their numbers only (solvers, guided denoisers). Leaves
        that a list's entries share, such as a network's weights, are kept once.
      fixed: further arguments, the same at every point. Their arrays are arguments of the program;
        everything else is static.
      chunk: points at a time: the memory it takes. All at once unless given.

    Raises:
      UserError: an empty axis, a name given twice, or entries of a list that differ in structure,
        naming the axis, the entry and the leaf.

    >>> found = jdiff.sweep(
    ...     sample, over={"denoiser": [guidance.cfg(denoise, w, null) for w in scales],
    ...                   "solver": [solvers.edm(churn) for churn in (0.0, 10.0, 40.0)]},
    ...     fixed=dict(key=key, times=times, shape=(8, 8, 1), num=64, cond=cond))
    >>> found.result.shape    # [scales, churns, 64, 8, 8, 1]
    """
    fixed = dict(fixed or {})
    if both := sorted(over.keys() & fixed.keys()):
        raise UserError(f"sweep: {both} is given in over and in fixed; give it once.")
    if not over:
        raise UserError("sweep: over is empty; give at least one axis, e.g. {'scale': [1.0, 2.0]}.")
    names = tuple(over)
    axes = [_axis(name, over[name]) for name in names]
    sizes = tuple(axis.size for axis in axes)
    if chunk is not None and chunk < 1:
        raise UserError(f"sweep: chunk={chunk} given; it is at least 1.")
    leaves, treedef = jax.tree.flatten(fixed)
    is_array = tuple(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    result = _run(
        [(axis.each, axis.shared) for axis in axes],
        [leaf for leaf, array in zip(leaves, is_array) if array],
        fn=fn, names=names, sizes=sizes, chunk=chunk, layouts=tuple(axis.layout for axis in axes),
        fixed=(treedef, is_array, tuple(leaf for leaf, a in zip(leaves, is_array) if not a)),
    )  # fmt: skip
    return Sweep(result, dict(over))


class _Axis(NamedTuple):
    """An axis taken apart: leaves that differ `[size, ...]`, and leaves that all entries share."""

    size: int
    each: list[Array]
    shared: list[Any]
    layout: tuple[Any, tuple[bool, ...]]  # the structure of an entry, and which leaves differ


def _axis(name: str, values: Any) -> _Axis:
    if isinstance(values, jax.Array | np.ndarray):
        if not values.ndim or not len(values):
            raise UserError(f"sweep: over[{name!r}] of shape {values.shape} has no points.")
        return _Axis(len(values), [jnp.asarray(values)], [], (jax.tree.structure(0), (True,)))
    if not isinstance(values, list | tuple) or not values:
        raise UserError(
            f"sweep: over[{name!r}] must be an array or a list with at least one entry: {values!r}."
        )
    rows, (treedef, *others) = zip(*(jax.tree.flatten(entry) for entry in values))
    for i, other in enumerate(others, 1):
        if other != treedef:
            raise UserError(
                f"sweep: over[{name!r}][{i}] differs in structure from the first entry ({other}; "
                f"{treedef}); one program serves entries that differ in numbers only."
            )
    columns = list(zip(*rows))
    differs = tuple(any(leaf is not column[0] for leaf in column) for column in columns)
    paths = jax.tree_util.tree_leaves_with_path(values[0])
    each = []
    for column, d, (path, _) in zip(columns, differs, paths):
        shapes = {jnp.shape(leaf) for leaf in column}
        if len(shapes) > 1:
            leaf = jax.tree_util.keystr(path) or "itself"
            raise UserError(
                f"sweep: the entries of over[{name!r}] differ in shape at leaf {leaf}: "
                f"{sorted(shapes)}."
            )
        if d:
            each.append(jnp.stack([jnp.asarray(leaf) for leaf in column]))
    shared = [column[0] for column, d in zip(columns, differs) if not d]
    return _Axis(len(values), each, shared, (treedef, differs))


@partial(jax.jit, static_argnames=("fn", "names", "sizes", "chunk", "layouts", "fixed"))
def _run(
    axes: list, arrays: list, *, fn: Any, names: tuple, sizes: tuple, chunk: int | None,
    layouts: tuple, fixed: tuple,
) -> PyTree:  # fmt: skip
    treedef, is_array, constants = fixed
    arrays, constants = iter(arrays), iter(constants)
    rest = treedef.unflatten([next(arrays) if a else next(constants) for a in is_array])

    def one(flat: Array) -> PyTree:
        point = {}
        for name, i, (each, shared), (treedef, differs) in zip(
            names, jnp.unravel_index(flat, sizes), axes, layouts
        ):
            each, shared = iter(each), iter(shared)
            leaves = [next(each)[i] if d else next(shared) for d in differs]
            point[name] = treedef.unflatten(leaves)
        return fn(**point, **rest)

    # Rounds of equal size, so that the function is compiled once; the last may repeat its last.
    total = math.prod(sizes)
    rounds = -(-total // min(chunk or total, total))
    size = -(-total // rounds)
    flat = jnp.minimum(jnp.arange(rounds * size), total - 1).reshape(rounds, size)
    if rounds == 1:
        out = jax.vmap(one)(flat[0])
    else:
        out = jax.lax.map(jax.vmap(one), flat)
        out = jax.tree.map(lambda a: a.reshape(rounds * size, *a.shape[2:])[:total], out)
    return jax.tree.map(lambda a: a.reshape(*sizes, *a.shape[1:]), out)
