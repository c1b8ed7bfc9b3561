"""TPU slices against the tables of Google's documentation."""

import pytest

from jdiff.errors import UserError
from jdiff.launching import tpu_slices

# (type, topology, chips, hosts), from the "Configurations" tables of the Cloud TPU pages.
PUBLISHED = [
    ("v5p-8", "2x2x1", 4, 1), ("v5p-16", "2x2x2", 8, 2), ("v5p-64", "2x4x4", 32, 8),
    ("v5p-128", "4x4x4", 64, 16), ("v5p-256", "4x4x8", 128, 32), ("v5p-512", "4x8x8", 256, 64),
    ("v5p-1024", "8x8x8", 512, 128), ("v5p-2048", "8x8x16", 1024, 256),
    ("v5p-4096", "8x16x16", 2048, 512), ("v5p-12288", "16x16x24", 6144, 1536),
    ("v4-8", "2x2x1", 4, 1), ("v4-32", "2x2x4", 16, 4),
    ("v5litepod-1", "1x1", 1, 1), ("v5litepod-4", "2x2", 4, 1), ("v5litepod-8", "2x4", 8, 1),
    ("v5litepod-16", "4x4", 16, 4), ("v5litepod-256", "16x16", 256, 64),
    ("v6e-8", "2x4", 8, 1), ("v6e-32", "4x8", 32, 8), ("v6e-128", "8x16", 128, 32),
]  # fmt: skip


@pytest.mark.parametrize("type, topology, chips, hosts", PUBLISHED)
def test_a_type_has_its_published_topology(type, topology, chips, hosts):
    found = tpu_slices.parse(type)
    assert (found.topology, found.chips, found.hosts, found.type) == (topology, chips, hosts, type)
    same = tpu_slices.parse(found.generation, topology)  # v5p with --topology
    assert same == found


def test_a_topology_that_is_no_cube_can_be_chosen():
    assert tpu_slices.parse("v5p-512", "4x4x16").hosts == 64
    assert tpu_slices.parse("V5E-16").type == "v5litepod-16"


@pytest.mark.parametrize(
    "accelerator, topology, says",
    [
        ("v5p-10", None, "Nearest: v5p-8, v5p-16"),
        ("v6e-512", None, "Nearest: v6e-256"),
        ("v5p-257", None, "does not exist"),
        ("v7-8", None, "v7"),
        ("v5p", None, "say how large"),
        ("v5p", "4x8", "3 dimensions"),
        ("v6e", "4x4x4", "2 dimensions"),
        ("v6e", "2x8", "Allowed: 1x1, 2x2, 2x4, 4x4"),
        ("v5p", "4x4x6", "multiples of 4"),
        ("v5p", "8x4x4", "Did you mean 4x4x8"),
        ("v4", "16x16x20", "4096 at most"),
        ("v5p-256", "4x4x4", "v5p-128"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(accelerator, topology, says):
    with pytest.raises(UserError, match=says):
        tpu_slices.parse(accelerator, topology)
