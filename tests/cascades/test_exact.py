"""The exact denoiser of a data set under a low-resolution input, and cascades of it on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import same

from jdiff import UserError, cascades, denoisers, grids, schedules
from jdiff.cascades import augmentations, cascade, low_res, stage
from jdiff.data.digits import load

EDM = schedules.edm()
TIMES = grids.karras(EDM, 12)
PIXELS, LABELS = (a[:150] for a in load()["train"])
DIGITS = jnp.asarray(PIXELS / 127.5 - 1.0, jnp.float32)


def reference(x, z, alpha, sigma, a, b, images, small):
    """E[x0 | x, z] in numpy: every image weighted by both likelihoods."""
    flat = lambda v: np.asarray(v, np.float64).reshape(len(v), -1)
    square = lambda p, q: ((p[:, None] - q) ** 2).sum(-1)
    log_r = -0.5 * square(flat(x), alpha * flat(images)) / sigma**2
    log_r -= 0.5 * square(flat(z), a * flat(small)) / b**2
    r = np.exp(log_r - log_r.max(1, keepdims=True))
    return (r / r.sum(1, keepdims=True)) @ flat(images)


@pytest.mark.parametrize("residual", [False, True])
def test_it_weighs_images_by_both_likelihoods(residual):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(7, 4, 4, 1)).astype(np.float32)
    low = low_res(2, augmentations.gaussian(), up="nearest", residual=residual)
    denoise = cascades.exact(jnp.asarray(images), schedules.cosine(), low, chunk=3)
    x = rng.normal(size=(3, 4, 4, 1)).astype(np.float32)
    z = rng.normal(size=(3, 2, 2, 1)).astype(np.float32)
    t, level = 0.6, 0.5
    cond = {"low_res": jnp.asarray(z), "aug_level": jnp.full(3, level)}
    found = jax.jit(lambda: denoise(jnp.asarray(x), jnp.full(3, t), cond))()
    (alpha, sigma), (a, b) = ((np.cos(s * np.pi / 2), np.sin(s * np.pi / 2)) for s in (t, level))
    small = images.reshape(7, 2, 2, 2, 2, 1).mean((2, 4))
    base = np.repeat(np.repeat(z, 2, 1), 2, 2) if residual else 0.0
    x0 = reference(x + alpha * base, z, alpha, sigma, a, b, images, small).reshape(x.shape) - base
    np.testing.assert_allclose(found.x0, x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alpha * found.x0 + sigma * found.eps, x, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_all_noise_says_nothing():
    low = low_res(2, augmentations.gaussian())
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    cond = {"low_res": jnp.ones((2, 4, 4, 1)), "aug_level": jnp.ones(2)}
    call = jax.jit(lambda denoise: denoise(x, jnp.ones(2), cond))
    told, plain = call(cascades.exact(DIGITS, EDM, low)), call(denoisers.exact(DIGITS, EDM))
    same(told, plain, rtol=1e-4, atol=1e-5)


def nearest(images, of):
    """(row, largest difference) of the image of `of` next to each of `images`."""
    gaps = np.abs(np.asarray(images)[:, None] - np.asarray(of)).reshape(len(images), len(of), -1)
    row = (gaps**2).sum(-1).argmin(1)
    return row, np.take_along_axis(gaps.max(-1), row[:, None], 1)[:, 0]


@pytest.mark.parametrize(
    ("augmentation", "level"),
    [(None, None), (augmentations.gaussian(), 0.0), (augmentations.gaussian(), 0.7)],
    ids=["none", "level 0", "level 0.7"],
)
def test_a_cascade_of_them_draws_the_training_digits(augmentation, level):
    low = low_res(2, augmentation)
    small = low.shrink(DIGITS)
    base = stage(denoisers.exact(small, EDM, labels=LABELS), times=TIMES, shape=(4, 4, 1))
    top = cascades.exact(DIGITS, EDM, low, labels=LABELS)
    up = stage(top, times=TIMES, shape=(8, 8, 1), low_res=low, level=level)
    wanted = np.arange(40) % 10
    first, last = cascade(base, up).sample(
        jax.random.key(1), {"label": jnp.asarray(wanted)}, intermediate=True
    )
    (row_4, gap_4), (row_8, gap_8) = nearest(first, small), nearest(last, DIGITS)
    assert max(gap_4.max(), gap_8.max()) < 1e-3
    np.testing.assert_array_equal(LABELS[row_4], wanted)
    np.testing.assert_array_equal(LABELS[row_8], wanted)
    assert len(set(row_8)) > 20
    if level:  # the noise leaves room for another digit of the class
        assert (row_4 != row_8).any()
    else:
        np.testing.assert_array_equal(row_4, row_8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cascades.exact(DIGITS, EDM, low_res(2, augmentations.blur())), "exact blur gauss"),
        (lambda: cascades.exact(DIGITS, {"a": EDM}, low_res(2)), "exact schedule one"),
        (lambda: cascades.exact(DIGITS, EDM, low_res(3)), "factor=3 8 x 8"),
        (lambda: cascades.exact(DIGITS, EDM, low_res(2))(DIGITS, jnp.ones(150)), "low_res missing"),
    ],
)
def test_what_it_refuses(make, words):
    with pytest.raises(UserError) as error:
        make()
    for word in words.split():
        assert word in str(error.value)
