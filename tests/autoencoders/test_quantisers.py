"""Codebooks and finite scalars, against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.autoencoders import fsq, vq
from jdiff.autoencoders.discrete import counts, perplexity
from jdiff.models.initializers import Unseeded

KEY = jax.random.key(0)
CODES = np.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], np.float32)


def codebook(**changes) -> tuple:
    """(quantize(params, z, key), params) of one of the two codebooks, with `CODES` in it."""
    given = {"codes": 3, "channels": 2, "commitment": 0.25} | changes
    cls = vq.MovingCodebook if "decay" in given else vq.Codebook
    apply, _ = models.abstract(lambda rngs: cls(**given, rngs=rngs))
    params = (
        {"count": np.ones(3, np.float32), "total": CODES}
        if "decay" in given
        else {"vectors": CODES}
    )
    return jax.jit(apply.method("quantize")), params


def test_each_latent_becomes_the_nearest_code():
    z = np.asarray([[[[0.4, 0.1], [0.6, 0.1]], [[0.1, 1.1], [9.0, 0.0]]]], np.float32)
    quantize, params = codebook()
    found = quantize(params, z, None)
    np.testing.assert_array_equal(found.index, [[[0, 1], [2, 1]]])
    np.testing.assert_array_equal(found.z, CODES[np.asarray(found.index)])
    distances = np.square(z[..., None, :] - CODES).sum(-1)
    np.testing.assert_array_equal(found.index, distances.argmin(-1))


def test_the_gradient_goes_straight_through_and_the_penalty_is_equation_3():
    """Of |sg(z) - e|^2 + beta |z - sg(e)|^2 as means over entries, to latents and vectors."""
    z = np.asarray([[[[0.4, 0.1], [0.1, 1.5]]]], np.float32)
    quantize, params = codebook()

    def penalty(params, z):
        return quantize(params, z, None).penalty.sum()

    q = CODES[[0, 2]]
    np.testing.assert_allclose(penalty(params, z), 1.25 * np.square(z[0, 0] - q).mean(), rtol=1e-6)
    by_params, by_z = jax.jit(jax.grad(penalty, (0, 1)))(params, z)
    np.testing.assert_allclose(by_z[0, 0], 0.25 * 2 * (z[0, 0] - q) / 4, rtol=1e-6)
    expected = np.zeros((3, 2))
    expected[[0, 2]] = 2 * (q - z[0, 0]) / 4
    np.testing.assert_allclose(by_params["vectors"], expected, rtol=1e-6)
    through = jax.jit(jax.grad(lambda z: (quantize(params, z, None).z ** 2).sum()))(z)
    np.testing.assert_allclose(through[0, 0], 2 * q)  # d q^2 / d q, as if z were q


def test_moving_means_are_those_of_the_assigned_latents():
    """A step of descent with rate 1 on the penalty makes the update of VQ-VAE's appendix A.1."""
    quantize, params = codebook(decay=0.9, revive=0.0)
    z = np.asarray([[[[0.4, 0.1], [0.2, -0.1], [0.9, 0.3], [0.0, 0.2]]]], np.float32)  # 0, 0, 1, 0
    loss = lambda p: quantize(p, z, KEY).penalty.mean()
    value = quantize(params, z, None).penalty.mean()
    np.testing.assert_allclose(loss(params), value, rtol=1e-6)  # the movement has no value
    after = jax.tree.map(lambda p, g: p - g, params, jax.jit(jax.grad(loss))(params))
    share = np.asarray([3.0, 1.0, 0.0]) * 3 / 4  # uses, of a mean of 4 / 3
    sums = np.asarray([[0.6, 0.2], [0.9, 0.3], [0.0, 0.0]]) * 3 / 4
    np.testing.assert_allclose(after["count"], 0.9 + 0.1 * share, rtol=1e-5)
    np.testing.assert_allclose(after["total"], 0.9 * CODES + 0.1 * sums, rtol=1e-5, atol=1e-7)
    # Latents that stay where they are become the codes.
    fixed = jnp.asarray([[0.4, 0.1], [0.2, -0.1], [0.9, 0.3], [0.0, 2.5]])
    count, total, index = jnp.ones(3), CODES, jnp.asarray([0, 0, 1, 2])
    move = jax.jit(lambda c, t: vq.averaged(c, t, fixed, index, 0.5, 0.0, KEY))
    for _ in range(40):
        count, total = move(count, total)
    means = jnp.asarray([[0.3, 0.0], [0.9, 0.3], [0.0, 2.5]])
    np.testing.assert_allclose(total / count[:, None], means, atol=1e-5)


def test_codes_without_use_come_back_as_latents():
    z = np.random.default_rng(0).standard_normal((8, 2), np.float32)
    count, total = np.asarray([1.0, 0.02, 1.0], np.float32), CODES
    index = np.zeros(8, int)
    after, moved = jax.jit(vq.averaged)(count, total, z, index, 0.99, 0.03, KEY)
    assert after[1] == 1 and after[2] == np.float32(0.99)
    assert (np.abs(z - moved[1]).sum(-1) == 0).any()
    np.testing.assert_allclose(moved[2], 0.99 * CODES[2])


def test_perplexity_counts_codes_used_evenly():
    index = np.asarray([[0, 1], [2, 3]])
    found = jax.jit(lambda index: perplexity(counts(index, 9)))
    np.testing.assert_allclose([found(index), found(0 * index)], [4.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3, 4)])
def test_every_code_of_fsq_is_reached_and_numbered_once(levels):
    """Bounded values reach all of the levels and no other; numbers and vectors are one to one."""
    n = int(np.prod(levels))
    codes, again, same = jax.jit(
        lambda index: (
            codes := fsq.code_of(index, levels), fsq.index_of(codes, levels),
            fsq.rounded(codes, levels),
        )
    )(np.arange(n))  # fmt: skip
    np.testing.assert_array_equal(again, np.arange(n))
    np.testing.assert_allclose(same, codes, atol=1e-7)
    assert len(np.unique(np.asarray(codes), axis=0)) == n
    wide = np.linspace(-20.0, 20.0, 2001, dtype=np.float32)[:, None] * np.ones(len(levels))
    half = np.asarray(levels) // 2
    q = np.asarray(jax.jit(lambda h: fsq.rounded(fsq.bound(h, levels) / half, levels))(wide))
    for c, count in enumerate(levels):
        assert len(np.unique(q[:, c])) == count
    assert np.abs(q).max() <= 1


def test_bounded_latents_of_fsq_begin_at_zero_and_are_rounded_to_the_nearest():
    levels = (8, 5)
    np.testing.assert_allclose(fsq.bound(jnp.zeros(2), levels), 0.0, atol=1e-6)
    z = jnp.asarray([0.6 / 4, -0.7 / 2])  # in units of 8 // 2 and 5 // 2
    np.testing.assert_allclose(fsq.rounded(z, levels), [1 / 4, -1 / 2], rtol=1e-6)
    slope = jax.grad(lambda z: fsq.rounded(z, levels).sum())(z)
    np.testing.assert_array_equal(slope, 1.0)


@pytest.mark.parametrize("cls", [vq.VQ, fsq.FSQ])
def test_decoding_begins_with_quantising(cls):
    """Latents that are quantised already decode to the same image."""
    build = lambda rngs: cls(widths=(4, 4), blocks=1, groups=1, attention=False, rngs=rngs)
    apply, params = models.init(build, KEY)
    x = jax.random.normal(KEY, (1, 8, 8, 3))

    @jax.jit
    def both(params, x):
        z = apply.method("encode")(params, x).mean
        q = apply.method("quantize")(params, z).z
        return z, q, apply.method("decode")(params, z), apply.method("decode")(params, q)

    z, q, image, again = both(params, x)
    assert z.shape == (1, 4, 4, build(Unseeded()).channels) and image.shape == x.shape
    assert float(jnp.abs(z - q).max()) > 1e-3
    np.testing.assert_allclose(image, again, atol=1e-5)
