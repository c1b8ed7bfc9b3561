"""Which rows of a batch each of many hosts reads: laid out on devices that are not there."""

import itertools
import types

import jax
import numpy as np
import pytest

from jdiff import parallel
from jdiff.parallel import layout as layouts


class Device(types.SimpleNamespace):
    """A stand-in of a host's device; jax asks its client which process is asking."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def rows(sizes, hosts, order, batch):
    """The rows of each host, on a mesh of 16 devices in this order."""
    found = []
    for here in range(hosts):
        client = types.SimpleNamespace(process_index=lambda here=here: here)
        devices = [
            Device(id=i, process_index=i * hosts // 16, client=client, platform="cpu")
            for i in order
        ]
        grid = np.array(devices).reshape([sizes.get(axis, 1) for axis in parallel.AXES])
        mesh = jax.sharding.Mesh(grid, parallel.AXES)
        found.append(layouts.layout(mesh).rows(batch))
    return found


MESHES = [
    dict(zip(parallel.AXES, sizes))
    for sizes in itertools.product((1, 2, 4, 8, 16), repeat=4)
    if np.prod(sizes) == 16
]


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("order", ["in turn", "dealt out"])
def test_the_hosts_read_every_row_and_none_reads_one_that_it_does_not_need(hosts, order):
    order = {"in turn": range(16), "dealt out": [*range(0, 16, 2), *range(1, 16, 2)]}[order]
    for sizes in MESHES:
        parts = sizes["data"] * sizes["fsdp"]
        read = rows(sizes, hosts, order, 32)
        assert set(np.concatenate(read)) == set(range(32)), sizes
        assert all((np.diff(r) > 0).all() for r in read), sizes
        # A part of the batch has 16 / parts devices: with as many hosts or fewer, it is read so
        # often; a host reads the parts of its own devices, no more.
        for here, mine in enumerate(read):
            places = [k for k, i in enumerate(order) if i * hosts // 16 == here]
            wanted = {place // (16 // parts) for place in places}
            assert {int(r) // (32 // parts) for r in mine} == wanted, sizes
            assert len(mine) == len(wanted) * 32 // parts, sizes
        if parts == 16:
            assert sum(map(len, read)) == 32  # no row is read twice
