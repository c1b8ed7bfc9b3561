"""Enlarging a small image against torch.nn.functional.interpolate, by whole and broken factors."""

import numpy as np
import pytest
from peers import peer

from jdiff.models.low_res import enlarge

torch = peer("torch")

SMALL = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).astype(np.float32)
SIZES = [(12, 10), (24, 20), (18, 40), (7, 5), (9, 11), (16, 13)]


def theirs(size, mode, **fields):
    small = torch.from_numpy(SMALL).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(small, size=size, mode=mode, **fields)
    return large.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bilinear(size):
    for antialias in (False, True):  # nothing is made smaller, so it changes nothing
        expected = theirs(size, "bilinear", align_corners=False, antialias=antialias)
        np.testing.assert_allclose(enlarge(SMALL, size), expected, rtol=1e-5, atol=1e-5)
    corners = theirs(size, "bilinear", align_corners=True)
    assert np.abs(enlarge(SMALL, size) - corners).max() > 0.05


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bicubic(size):
    """PyTorch's antialias=True has Keys' a = -1/2, as Pillow has; its default has a = -3/4.

    With -3/4 a linear ramp does not stay one (Keys 1981 finds -1/2 the only choice of third
    order), and a border pixel is repeated instead of the weights being scaled.
    """
    fields = {"mode": "bicubic", "align_corners": False}
    ours = np.asarray(enlarge(SMALL, size, "bicubic"))
    np.testing.assert_allclose(ours, theirs(size, antialias=True, **fields), rtol=1e-4, atol=1e-5)
    assert np.abs(ours - theirs(size, antialias=False, **fields)).max() > 0.05


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nearest(size):
    """That of "nearest-exact", pixels as areas; "nearest" takes corners for centres."""
    np.testing.assert_array_equal(enlarge(SMALL, size, "nearest"), theirs(size, "nearest-exact"))
    whole = all(n % m == 0 for n, m in zip(size, SMALL.shape[1:3]))
    assert np.array_equal(enlarge(SMALL, size, "nearest"), theirs(size, "nearest")) == whole
