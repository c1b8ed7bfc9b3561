"""Words for devices, and what is known of them."""

import math

import pytest

from jdiff.errors import UserError
from jdiff.models.flops import PEAKS
from jdiff.planning import CHIPS, devices
from jdiff.planning.chips import named


@pytest.mark.parametrize(
    ("word", "chip", "count", "slices"),
    [
        ("v5p-256", "v5p", 128, 1),  # named by TensorCores, two a chip
        ("v4-8", "v4", 4, 1),
        ("v5e-16", "v5e", 16, 1),  # named by chips
        ("v5litepod-256", "v5e", 256, 1),
        ("v6e-8", "v6e", 8, 1),
        ("tpu-v6e-8", "v6e", 8, 1),
        ("2xv5p-256", "v5p", 256, 2),
        ("64xH200", "h200", 64, 1),
        ("8xA100", "a100-80", 8, 1),
        ("8xA100-40", "a100-40", 8, 1),
        ("b200", "b200", 1, 1),
        ("8xcpu", "cpu", 8, 1),
        ("8", "cpu", 8, 1),  # of this machine's kind
    ],
)
def test_words(word, chip, count, slices):
    found = devices(word)
    assert (found.chip.name, found.count, found.slices) == (chip, count, slices)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("64xH2000", "8xh200"),
        ("v7p-256", "v5p-16"),
        ("8xA10", "8xa100"),
        ("v5p", "v5p-16 (8 chips)"),
        ("v5p-7", "TensorCores"),
        ("h100-8", "8xh100"),
        ("0xh100", "at least one"),
        ("0", "at least one"),
        ("", "v5p-256"),
    ],
)
def test_mistakes_name_the_nearest(word, says):
    with pytest.raises(UserError, match="--devices=") as caught:
        devices(word)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("word", "topology"),
    [("v5p-256", "v5p:4x4x8"), ("v4-8", "v4:2x2x1"), ("v4-16", "v4:2x2x2"), ("v5e-8", "v5e:2x4"),
     ("v5e-256", "v5e:16x16"), ("2xv6e-16", "v6e:4x4")],
)  # fmt: skip
def test_slices_are_as_even_as_powers_of_two_allow(word, topology):
    """The shapes of Google Cloud's tables."""
    found = devices(word)
    assert found.topology == topology
    sides = topology.partition(":")[2].split("x")
    assert math.prod(map(int, sides)) == found.count // found.slices


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
     ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
     ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
     ("NVIDIA B200", "b200"), ("cpu", "cpu"), ("Tesla T4", "Tesla T4")],
)  # fmt: skip
def test_what_jax_calls_them(kind, chip):
    assert named(kind).name == chip


def test_links_join_a_slice_or_a_machine():
    assert devices("v5p-256").joined == devices("2xv5p-256").joined == 128
    assert devices("64xh200").joined == 8


def test_every_published_peak_is_a_chip():
    known = {name for name, chip in CHIPS.items() if chip.peak}
    wanted = {name.removeprefix("tpu-") for name in PEAKS} - {"a100"} | {"a100-40", "a100-80"}
    assert known == wanted
    for name in known:
        chip = CHIPS[name]
        assert chip.single <= chip.peak and chip.network < chip.link < chip.bandwidth
