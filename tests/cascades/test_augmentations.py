"""What all augmentations promise, and the Gaussian one in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from closed_forms import x64

from jdiff import UserError, schedules
from jdiff.cascades import augmentations
from jdiff.cascades.augmentations import blur, chain, down_up, gaussian, jpeg, none
from jdiff.predictions import corrupt
from jdiff.pytree import noise_like

KINDS = {
    "none": none(),
    "gaussian": gaussian(),
    "blur": blur(share=1.0),
    "jpeg": jpeg(),
    "down_up": down_up(low=0.5),
    "chain": chain(blur(share=1.0), gaussian(high=0.5), jpeg(), down_up(low=0.5)),
}
RANDOM = np.random.default_rng(0)
B = 5
IMAGES = jnp.asarray(RANDOM.uniform(-1.1, 1.1, (B, 12, 10, 3)), jnp.float32).at[0, 0].set(-0.0)
KEYS = jax.random.split(jax.random.key(0), B)
EPS = noise_like(KEYS, IMAGES)

augment = jax.jit(lambda augmentation, keys, images, level: augmentation(keys, images, level))


def levels(name, off=()):
    """Training's, drawn; 0 for the samples in `off`."""
    drawn = KINDS[name].draw(jax.random.key(1), B)
    return jax.tree.map(lambda a: a.at[jnp.asarray(off, int)].set(0.0), drawn)


def bits(a):
    return np.asarray(a).tobytes()


@pytest.mark.parametrize("name", KINDS)
def test_level_0_is_the_identity_bit_for_bit_beside_samples_of_other_levels(name):
    made = augment(KINDS[name], KEYS, IMAGES, levels(name, off=(0, 3)))
    assert made.dtype == IMAGES.dtype
    for i in (0, 3):
        assert bits(made[i]) == bits(IMAGES[i])
    for i in (1, 2, 4):
        assert (bits(made[i]) == bits(IMAGES[i])) == (name == "none")


@pytest.mark.parametrize("name", KINDS)
def test_a_row_depends_neither_on_the_size_of_the_batch_nor_on_its_neighbours(name):
    level = levels(name)
    whole = augment(KINDS[name], KEYS, IMAGES, level)
    for rows in (slice(2, 3), *([slice(1, 4)] if name == "chain" else [])):
        part = augment(
            KINDS[name], *jax.tree.map(lambda a, rows=rows: a[rows], (KEYS, IMAGES, level))
        )
        assert bits(part) == bits(whole[rows])
    reverse = jax.tree.map(lambda a: a[::-1], (KEYS, IMAGES, level))
    assert bits(augment(KINDS[name], *reverse)) == bits(whole[::-1])


def test_a_row_under_vmap_is_the_same():
    whole = augment(KINDS["chain"], KEYS, IMAGES, levels("chain"))
    alone = jax.tree.map(lambda a: a[:, None], (KEYS, IMAGES, levels("chain")))
    made = jax.vmap(augment, (None, 0, 0, 0))(KINDS["chain"], *alone)
    np.testing.assert_allclose(made[:, 0], whole, atol=3e-6)


@pytest.mark.parametrize("name", KINDS)
def test_the_program_does_not_grow_with_the_batch(name):
    def length(num):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num))
        level = jax.eval_shape(lambda: KINDS[name].draw(jax.random.key(0), num))
        images = jax.ShapeDtypeStruct((num, 12, 10, 3), jnp.float32)
        return str(jax.make_jaxpr(KINDS[name])(keys, images, level)).count(" = ")

    assert length(64) == length(2)


def test_one_level_serves_all_samples_and_half_precision_comes_back_as_such():
    one = augment(gaussian(), KEYS, IMAGES, 0.5)
    each = augment(gaussian(), KEYS, IMAGES, jnp.full(B, 0.5))
    assert bits(one) == bits(each)
    half = augment(gaussian(), KEYS, IMAGES.astype(jnp.bfloat16), 0.5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), one, atol=0.03)


def test_new_ranges_and_levels_do_not_compile_again():
    wide = gaussian(low=0.0, high=1.0)
    augment(wide, KEYS, IMAGES, jnp.full(B, 0.5))
    before = augment._cache_size()
    augment(gaussian(low=0.2, high=0.9), KEYS, IMAGES, jnp.full(B, 0.3))
    assert augment._cache_size() == before


# The Gaussian.

SCHEDULES = {
    "cosine": (schedules.cosine, 0.4),
    "squared_cosine": (schedules.squared_cosine, 300.0),
    "rectified_flow": (schedules.rectified_flow, 0.3),
    "edm": (schedules.edm, 2.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_is_the_forward_process_and_its_level_0_the_data(name):
    make, t = SCHEDULES[name]
    level = jnp.asarray([0.0, 0.5, 1.0, 1.5, 2.0], jnp.float32) * t
    made = gaussian(make(), high=2 * t)(KEYS, IMAGES, level)
    np.testing.assert_array_equal(made, corrupt(make(), IMAGES, EPS, level))
    assert bits(made[0]) == bits(IMAGES[0])


def test_gaussian_has_the_moments_of_its_level():
    """x = 0.7 at s: mean 0.7 cos(pi s / 2), variance sin^2(pi s / 2), and normal."""
    s = np.array([0.1, 0.5, 0.9])
    side, x = 64, 0.7
    n = side * side
    made = np.asarray(
        augment(gaussian(), KEYS[:3], jnp.full((3, side, side, 1), x), jnp.asarray(s, jnp.float32))
    ).reshape(3, n)
    alpha, sigma = np.cos(np.pi * s / 2), np.sin(np.pi * s / 2)
    assert (np.abs(made.mean(1) - alpha * x) < 4 * sigma / np.sqrt(n)).all()
    assert (np.abs(made.var(1) / sigma**2 - 1) < 4 * np.sqrt(2 / n)).all()
    z = (made - alpha[:, None] * x) / sigma[:, None]
    assert all(scipy.stats.kstest(row, "norm").pvalue > 1e-3 for row in z)
    assert (np.abs(np.corrcoef(z)[np.triu_indices(3, 1)]) < 4 / np.sqrt(n)).all()


def test_gaussian_by_default_goes_to_pure_noise_and_tells_its_level():
    default = gaussian()
    assert default.tells and default.low == 0 and np.isclose(default.high, 1.0, rtol=1e-6)
    assert gaussian(schedules.ddpm_linear()).high == 1000
    level = jnp.asarray([0.2, 0.4])
    assert default.told(level) is level and default.at(0.3) == 0.3
    x = jnp.ones((1, 4, 4, 1))
    gap = augment(default, KEYS[:1], x, 1.0) - augment(default, KEYS[:1], -x, 1.0)
    np.testing.assert_allclose(gap, 0.0, atol=1e-6)


@x64
def test_gaussian_keeps_float64():
    x = jnp.asarray(RANDOM.normal(size=(2, 3, 3, 1)))
    keys, level = jax.random.split(jax.random.key(3), 2), jnp.asarray([0.25, 0.5])
    made = gaussian()(keys, x, level)
    eps = jax.vmap(lambda key: jax.random.normal(key, (3, 3, 1), jnp.float64))(keys)
    angle = np.pi / 2 * np.asarray([0.25, 0.5])[:, None, None, None]
    np.testing.assert_allclose(made, np.cos(angle) * x + np.sin(angle) * eps, rtol=1e-12)
    assert gaussian().draw(keys[0], 2).dtype == jnp.float32


# Levels of training.

NUM = 20_000


@pytest.mark.parametrize(
    ("augmentation", "low", "high", "share"),
    [
        (gaussian(low=0.2, high=0.7), 0.2, 0.7, 1.0),
        (gaussian(schedules.squared_cosine(), high=400.0), 0.0, 400.0, 1.0),
        (blur(), 0.4, 0.6, 0.5),
        (blur(low=1.0, high=3.0, share=0.2), 1.0, 3.0, 0.2),
        (jpeg(30.0, 95.0), 0.05, 0.7, 1.0),
        (jpeg(50.0, 80.0, share=0.9), 0.2, 0.5, 0.9),
        (down_up(low=0.5, high=2.0, share=0.7), 0.5, 2.0, 0.7),
    ],
)
def test_drawn_levels_are_uniform_for_a_binomial_share(augmentation, low, high, share):
    drawn = augmentation.draw(jax.random.key(5), NUM)
    assert drawn.shape == (NUM,) and drawn.dtype == jnp.float32
    degraded = np.asarray(drawn)[np.asarray(drawn) > 0]
    spread = np.sqrt(NUM * share * (1 - share))
    assert abs(len(degraded) - NUM * share) <= 4 * spread
    uniform = scipy.stats.uniform(low, high - low)
    assert scipy.stats.kstest(degraded, uniform.cdf).pvalue > 1e-3
    other = np.asarray(augmentation.draw(jax.random.key(6), NUM))
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 4 / np.sqrt(NUM)


def test_a_fixed_level_is_drawn_as_it_is():
    assert (gaussian(low=0.25, high=0.25).draw(jax.random.key(0), 7) == 0.25).all()
    assert (none().draw(jax.random.key(0), 7) == 0.0).all()


# Levels of sampling, and errors.


def test_sampling_must_set_a_level_that_the_network_is_told_and_may_leave_out_others():
    with pytest.raises(UserError, match="told the level.*from 0.1 to 0.5"):
        gaussian(low=0.1, high=0.5).at()
    for augmentation in (none(), blur(), jpeg(), down_up()):
        assert augmentation.at() == 0.0 and augmentation.told(0.0) is None
    assert blur().at(0.5) == 0.5
    told = blur(tells=True)
    assert told.at(0.0) == 0.0 and told.told(0.5) == 0.5
    with pytest.raises(UserError, match="sampling needs one"):
        told.at()


@pytest.mark.parametrize(
    ("augmentation", "level", "words"),
    [
        (gaussian(low=0.1, high=0.5), 0.6, "gaussian: level=0.6 given.*from 0.1 to 0.5"),
        (gaussian(low=0.1, high=0.5), 0.0, "level=0 given"),
        (gaussian(high=0.5), jnp.asarray([0.1, 0.7, 0.2]), "level=0.7 given"),
        (gaussian(), float("nan"), "level=nan"),
        (gaussian(), (0.1, 0.2), "one level"),
        (blur(), 0.7, "blur: level=0.7 given.*from 0.4 to 0.6, or 0"),
        (jpeg(), 0.9, "from 0.05 to 0.7, or 0"),
        (down_up(), -1.0, "from 0 to 2, or 0"),
        (none(), 0.1, "augmentation none: level=0.1"),
    ],
)
def test_levels_of_which_the_network_saw_nothing_are_errors(augmentation, level, words):
    with pytest.raises(UserError, match=words):
        augmentation.check(level)


def test_levels_at_the_ends_and_traced_ones_pass():
    augmentation = gaussian(low=0.1, high=0.7)
    augmentation.check(jnp.asarray([0.1, 0.7], jnp.float32))
    jax.eval_shape(lambda level: augmentation.check(level), 0.9)
    jax.eval_shape(lambda x: (augmentation.check(0.5), x), 0.9)  # a number inside a trace
    blur().check(jnp.asarray([0.0, 0.5]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gaussian(schedules.ve()), "at t = -inf"),
        (lambda: gaussian("cosine"), "a Schedule is needed, given 'cosine'"),
        (lambda: gaussian(high=1.5), "high=1.5 given; it lies between 0 and 1"),
        (lambda: gaussian(low=-0.1), "low=-0.1"),
        (lambda: gaussian(low=0.6, high=0.5), "low=0.6 is above high=0.5"),
        (lambda: blur(size=4), "size=4 given; it is an odd"),
        (lambda: blur(low=0.0), "low=0.0 given; it must be positive"),
        (lambda: blur(share=1.5), "share=1.5"),
        (lambda: jpeg(0.0, 50.0), "low_quality=0 given; it lies between 1 and 100"),
        (lambda: jpeg(70.0, 60.0), "low_quality=70 is above high_quality=60"),
        (lambda: down_up(low=-1.0), "low=-1"),
        (lambda: down_up(down="bicubik"), "'bicubik' is not known. Did you mean 'bicubic'"),
        (lambda: down_up(up="area"), "up 'area' is not known"),
        (lambda: chain(), "no augmentation given"),
        (lambda: chain(blur(), "jpeg"), "given 'jpeg'"),
        (lambda: chain(gaussian(), blur(tells=True)), "gaussian and blur both tell"),
        (lambda: none()(KEYS, IMAGES[0], 0.0), r"given float32 of shape \(12, 10, 3\)"),
        (lambda: none()(KEYS, IMAGES.astype(jnp.uint8), 0.0), "given uint8"),
        (lambda: blur(size=25)(KEYS, IMAGES, 0.5), "more than 12 pixels a side, given 12 x 10"),
        (lambda: jpeg()(KEYS, IMAGES[..., :2], 0.5), "1 or 3 channels, given 2"),
    ],
)
def test_what_is_not_allowed_is_said(make, words):
    with pytest.raises(UserError, match=words):
        make()


# Chains.


def test_a_chain_is_its_parts_in_order_each_with_keys_of_its_own():
    parts, level = KINDS["chain"].parts, levels("chain")
    image = IMAGES
    for i, part in enumerate(parts):
        assert bits(level[i]) == bits(part.draw(jax.random.fold_in(jax.random.key(1), i), B))
        keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(KEYS)
        image = augment(part, keys, image, level[i])
    made = augment(KINDS["chain"], KEYS, IMAGES, level)
    np.testing.assert_allclose(made, image, atol=3e-6)
    turned = augment(chain(*parts[::-1]), KEYS, IMAGES, level[::-1])
    assert np.abs(turned - made).max() > 0.1


def test_a_chain_tells_the_level_of_its_part_that_does():
    augmentation = chain(blur(), chain(jpeg(), gaussian(low=0.1, high=0.5)))
    assert augmentation.tells and augmentation.high == 0.5
    assert augmentation.at(0.3) == (0.0, (0.0, 0.3))
    assert augmentation.told(augmentation.at(0.3)) == 0.3
    assert augmentation.at((0.5, (0.2, 0.4))) == (0.5, (0.2, 0.4))
    silent = chain(blur(), jpeg())
    assert not silent.tells and silent.told(silent.at()) is None and silent.at() == (0.0, 0.0)
    for make, words in [
        (lambda: augmentation.at(), "sampling needs one"),
        (lambda: augmentation.at(0.7), "gaussian: level=0.7"),
        (lambda: augmentation.check((0.9, (0.2, 0.4))), "blur: level=0.9"),
        (lambda: augmentation.check(0.3), "a tuple of 2 levels"),
        (lambda: silent.at(0.3), "no part tells"),
    ]:
        with pytest.raises(UserError, match=words):
            make()


def test_every_kind_says_its_name():
    assert {name: KINDS[name].name for name in KINDS} == {name: name for name in KINDS}
    assert set(augmentations.BY_NAME) == set(KINDS)
