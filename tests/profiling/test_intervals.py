"""Sets of moments, against the same on a grid of ticks."""

import numpy as np
import pytest

from jdiff.profiling.intervals import both, total, union, without

TICKS = 60


def ticks(pairs):
    """Which ticks of [0, 60) the pairs cover."""
    covered = np.zeros(TICKS, bool)
    for start, end in pairs:
        covered[int(start) : int(end)] = True
    return covered


def draw(rng):
    starts = rng.integers(0, TICKS - 12, size=rng.integers(0, 9))
    return [(int(s), int(s + rng.integers(0, 12))) for s in starts]


@pytest.mark.parametrize("seed", range(40))
def test_they_are_sets_of_ticks(seed):
    rng = np.random.default_rng(seed)
    pairs, others = draw(rng), draw(rng)
    a, b = union(pairs), union(others)
    for made, wanted in (
        (a, ticks(pairs)),
        (both(a, b), ticks(pairs) & ticks(others)),
        (without(a, b), ticks(pairs) & ~ticks(others)),
    ):
        assert np.array_equal(ticks(made), wanted)
        assert total(made) == wanted.sum()
        assert all(start < end for start, end in made)
        assert all(x[1] <= y[0] for x, y in zip(made, made[1:]))
