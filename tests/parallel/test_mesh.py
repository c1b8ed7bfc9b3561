"""Meshes: sizes that fit and those that do not, and slices of a pod laid out by jax."""

import dataclasses

import jax
import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.parallel import AXES, make
from jdiff.parallel.mesh import adapted, fit


@pytest.mark.parametrize(
    ("sizes", "count", "shape"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"data": -1, "fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1)),  # data is the rest unless another axis is
        ({"fsdp": -1}, 8, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}, 8, (2, 2, 2, 1)),
        ({"tensor": 2, "sequence": -1, "data": 1}, 8, (1, 1, 2, 4)),
        ({"data": 1}, 1, (1, 1, 1, 1)),
    ],
)
def test_sizes(sizes, count, shape):
    assert tuple(fit(sizes, count)[axis] for axis in AXES) == shape


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": -1, "fsdp": 3}, r"fsdp=3 given for 8 devices.*\(1, 2, 4, 8\)"),
        ({"data": 2, "fsdp": 2}, r"data=2 x fsdp=2 given for 8 devices, and that is 4"),
        ({"data": 16}, "data=16 given for 8 devices, and that is 16"),
        ({"data": -1, "fsdp": -1}, "only one can be the rest"),
        ({"fsdp": 0}, "mesh.fsdp=0"),
        ({"fdsp": 2}, "fsdp"),
    ],
)
def test_sizes_that_do_not_fit_say_what_would(sizes, said):
    with pytest.raises(UserError, match=said):
        fit(sizes, 8)


@pytest.mark.parametrize(
    ("sizes", "count", "shape"),
    [
        ({"data": 2, "fsdp": 4}, 8, (2, 4, 1, 1)),  # fits
        ({"data": 2, "fsdp": 4}, 4, (1, 4, 1, 1)),
        ({"data": 2, "fsdp": 4}, 2, (1, 2, 1, 1)),
        ({"data": 2, "fsdp": 4}, 1, (1, 1, 1, 1)),
        ({"data": 2, "fsdp": 4}, 64, (16, 4, 1, 1)),
        ({"data": 1, "fsdp": 3, "tensor": 2}, 8, (4, 1, 2, 1)),
        ({"data": 4, "fsdp": -1, "tensor": 2}, 2, (1, 1, 2, 1)),
    ],
)
def test_weights_of_other_devices_find_a_place(sizes, count, shape):
    assert tuple(adapted(sizes, count)[axis] for axis in AXES) == shape


def test_all_devices_once_and_no_axis_explicit():
    mesh = make({"fsdp": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU v4 of a slice, as jax's mesh utilities look at it."""

    id: int
    slice_index: int
    coords: tuple
    process_index: int
    core_on_chip: int = 0
    device_kind: str = "TPU v4"
    platform: str = "tpu"


def pod(slices, shape=(2, 2, 1)):
    each = int(np.prod(shape))
    places = [tuple(int(n) for n in np.unravel_index(i, shape[::-1])[::-1]) for i in range(each)]
    return [Chip(s * each + i, s, at, s) for s in range(slices) for i, at in enumerate(places)]


@pytest.mark.parametrize(
    ("sizes", "slices", "across"),
    [
        ({"data": 2, "fsdp": 4}, 2, "data"),
        ({"data": -1, "fsdp": 4}, 4, "data"),
        ({"data": 1, "fsdp": 8}, 2, "fsdp"),  # no data axis to put them on
    ],
)
def test_slices_lie_along_the_first_axis_that_takes_them(sizes, slices, across):
    """Where a step talks least: of a slice's own devices no two are apart along another axis."""
    mesh = make(sizes, pod(slices))
    index = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    for axis, name in enumerate(AXES):
        varies = (index != np.take(index, [0], axis=axis)).any()
        assert varies == (name == across), name
    assert len(set(mesh.devices.flat)) == len(pod(slices))


def test_slices_over_two_axes():
    mesh = make({"data": 2, "fsdp": 8}, pod(4))
    index = np.vectorize(lambda d: d.slice_index)(mesh.devices)[:, :, 0, 0]
    assert [len(set(row)) for row in index] == [2, 2] and len(set(index[:, 0])) == 2


def test_slices_that_no_axis_takes():
    with pytest.raises(UserError, match="3 slices"):
        make({"data": 1, "fsdp": 4, "tensor": 3}, pod(3, (2, 2, 1))[:12])
