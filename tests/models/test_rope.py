"""Rotary embeddings: what they keep, what they forget, and the closed form of one plane."""

import cmath

import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.models import rope

DIMS = (4, 2, 6)
RANDOM = np.random.default_rng(0)
Q, K = RANDOM.standard_normal((2, 1, 5, 3, sum(DIMS))).astype(np.float32)
POSITIONS = RANDOM.uniform(-20, 20, (5, 3)).astype(np.float32)


def scores(shift=0.0, theta=10_000.0):
    """Scores [heads, queries, keys] with all positions moved by `shift`."""
    turn = rope.angles(POSITIONS + np.asarray(shift, np.float32), DIMS, theta)
    q, k = rope.rotate(Q, turn), rope.rotate(K, turn)
    return np.asarray(jnp.einsum("bqhd,bkhd->hqk", q, k))


def test_scores_depend_on_relative_position_alone():
    np.testing.assert_allclose(scores([7.0, -3.0, 0.5]), scores(), atol=2e-4)
    stretched = rope.angles(2 * POSITIONS, DIMS)
    moved = jnp.einsum("bqhd,bkhd->hqk", rope.rotate(Q, stretched), rope.rotate(K, stretched))
    assert np.abs(moved - scores()).max() > 0.1


def test_nothing_turns_at_the_origin():
    turn = rope.angles(np.zeros((5, 3)), DIMS)
    np.testing.assert_array_equal(rope.rotate(Q, turn), Q)


def test_norms_of_planes_are_kept():
    turned = np.asarray(rope.rotate(Q, rope.angles(POSITIONS, DIMS)))
    norms = [np.linalg.norm(a.reshape(*a.shape[:-1], -1, 2), axis=-1) for a in (turned, Q)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_one_plane_is_a_complex_number_times_its_phase():
    """Neighbouring channels, counter-clockwise, frequencies theta^(-2i / dim) within an axis."""
    turned = np.asarray(rope.rotate(Q, rope.angles(POSITIONS, DIMS, theta=256.0)))
    channel = 0
    for axis, dim in enumerate(DIMS):
        for i in range(dim // 2):
            for token, position in enumerate(POSITIONS[:, axis]):
                x = Q[0, token, :, channel : channel + 2].astype(np.float64)
                phase = cmath.exp(1j * float(position) * 256.0 ** (-2 * i / dim))
                z = (x[:, 0] + 1j * x[:, 1]) * phase
                y = turned[0, token, :, channel : channel + 2]
                np.testing.assert_allclose(y, np.stack([z.real, z.imag], -1), atol=1e-5)
            channel += 2
    assert channel == sum(DIMS)


def test_positions_of_each_sample():
    q = np.concatenate([Q, K])
    positions = np.stack([POSITIONS, 1 + 2 * POSITIONS])
    together = rope.rotate(q, rope.angles(positions, DIMS))
    for i in (0, 1):
        alone = rope.rotate(q[i : i + 1], rope.angles(positions[i], DIMS))
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-6)


def test_bfloat16_in_and_out_with_float32_angles():
    positions = np.float32([[1000.0], [1001.0]])  # one number in bfloat16
    turn = rope.angles(jnp.asarray(positions), (2,))
    assert turn.dtype == jnp.float32
    y = rope.rotate(jnp.ones((1, 2, 1, 2), jnp.bfloat16), turn)
    assert y.dtype == jnp.bfloat16
    expected = [[np.cos(p) - np.sin(p), np.sin(p) + np.cos(p)] for p in (1000.0, 1001.0)]
    np.testing.assert_allclose(y[0, :, 0].astype(jnp.float32), expected, atol=0.01)


def test_grid_runs_along_its_last_axis_first():
    positions = rope.grid([7], range(2), [-1, 0, 1])
    expected = [[7, row, column] for row in (0, 1) for column in (-1, 0, 1)]
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((4, 3, 2), r"rope_dims=\(4, 3, 2\) must be positive even numbers"),
        ((), r"rope_dims=\(\) must be positive even"),
        ((4, 4), r"\[5, 3\] have 3 axes, dims=\(4, 4\) has 2"),
    ],
)
def test_wrong_dims(dims, message):
    with pytest.raises(ValueError, match=message):
        rope.angles(POSITIONS, dims)


def test_dims_must_fill_the_head():
    rope.check_dims((4, 2), head=6)
    with pytest.raises(ValueError, match=r"sum to 6, a head has 8 channels"):
        rope.check_dims((4, 2), head=8)
