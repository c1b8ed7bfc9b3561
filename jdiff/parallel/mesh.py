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
        given = " x ".join(f"{name}={size}" for name, size in shape.items() if size > 1) or "1"
        fitting = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        why = f"{known} is not a divisor of it" if rest else f"that is {known}"
        raise UserError(
            f"mesh: {given} given for {count} devices, and {why}. Sizes are divisors ({fitting}) "
            f"whose product is {count}; -1 for one of them is what the others leave."
        )
    if rest:
        shape[rest[0]] = count // known
    return shape


def adapted(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`sizes` if they make `count` devices; else what of each axis divides them, data for the rest.

    For weights that were trained on other devices than there are now.

    Raises:
      UserError: an unknown axis.
    """
    for name in sizes:
        choose("mesh axis", name, AXES)
    try:
        return fit(sizes, count)
    except UserError:
        shape, left = {}, count
    for name in reversed(AXES[1:]):
        size = sizes.get(name, 1)
        shape[name] = left if size == -1 else math.gcd(size, left)
        left //= shape[name]
    return fit({"data": left, **shape}, count)


def _grid(shape: tuple[int, ...], devices: list[Any]) -> Any:
    """The devices as an array: within a slice by its own links, slices along data, then fsdp.

    Tensor and sequence talk in every layer, which the network between slices is too slow for.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across, left = [], slices
    for name, size in zip(AXES, shape):
        across.append(math.gcd(size, left) if name in ("data", "fsdp") else 1)
        left //= across[-1]
    if left > 1:
        given = " x ".join(f"{name}={size}" for name, size in zip(AXES, shape))
        raise UserError(
            f"mesh: {given} cannot be laid over {slices} slices; data x fsdp must be a multiple of "
            f"{slices}, since tensor and sequence stay within a slice."
        )
    within = [size // n for size, n in zip(shape, across)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )
