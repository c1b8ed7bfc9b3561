"""The mesh: all devices in four axes, laid out by jax so that neighbours are near."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from jdiff.errors import UserError, choose

#: The mesh's axes. data: copies of the weights, each with its part of the batch. fsdp: parts of the
#: batch, and the weights split too. tensor: heads and hidden units split. sequence: tokens split.
#: The first may cross the slowest links, as it moves gradients once a step; the last moves
#: activations in every layer.
AXES = ("data", "fsdp", "tensor", "sequence")


def make(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices (or of `devices`) with these sizes of its axes.

    Args:
      sizes: axis -> number of devices; -1 for one axis: what the others leave. Axes not named are
        1, and "data" is -1 if no axis is.

    Raises:
      UserError: an unknown axis, more than one -1, or sizes whose product is not the number of
        devices.

    >>> mesh = parallel.make({"fsdp": 8})  # on 32 devices: 4 copies of the weights, each on 8
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = fit(sizes, len(devices))
    names = tuple(shape)
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    grid = _grid(tuple(shape.values()), devices)
    return jax.sharding.Mesh(grid, names, axis_types=kinds)


def fit(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`sizes` with every axis, and -1 replaced, for `count` devices. Errors as `make`."""
    for name, size in sizes.items():
        choose("mesh axis", name, AXES)
        if size != -1 and size < 1:
            raise UserError(f"mesh.{name}={size} given; it must be positive, or -1 for the rest.")
    shape = {name: sizes.get(name, 1) for name in AXES}
    if "data" not in sizes and -1 not in shape.values():
        shape["data"] = -1
    rest = [name for name, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"mesh.{rest[0]} and mesh.{rest[1]} are both -1; only one can be the rest.")
    known = math.prod(size for size in shape.values() if size != -1)
    if count % known or (not rest and known != count):
        given = " x ".join(f"{name} {size}" for name, size in shape.items() if size > 1) or "1"
        near = max(d for d in range(1, known + 1) if count % d == 0)
        raise UserError(
            f"mesh: {given} does not make {count} devices. Sizes must multiply to it; the largest "
            f"divisor up to {known} is {near}. Give one axis -1 for the rest."
        )
    if rest:
        shape[rest[0]] = count // known
    return shape


def _grid(shape: tuple[int, ...], devices: list[Any]) -> Any:
    """The devices as an array: within a slice by its own links, slices along the first axes."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across, left = [], slices
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise UserError(
            f"mesh: sizes {shape} cannot be laid over {slices} slices; make data a multiple of it."
        )
    within = [size // n for size, n in zip(shape, across)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )
