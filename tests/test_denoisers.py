"""Denoisers: the exact ones against float64 brute force and autodiff, a network's against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from closed_forms import SCHEDULES, at, inside, mixture_1d, mixture_score, same, x64

from jdiff import UserError, denoisers, schedules
from jdiff.predictions import Prediction, corrupt, parameterization

EDM = schedules.edm()
_call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))
_log_density = jax.jit(lambda denoise, x, t, cond: denoise.log_density(x, t, cond))
_score = jax.jit(jax.grad(lambda x, denoise, t, cond: denoise.log_density(x, t, cond).sum()))


def _images(n=37, shape=(4, 4, 1), seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)
    return x, np.arange(n) % 3


def _brute_force(x, t, images, schedule, keep=None):
    """E[x0 | x_t = x] over the images: one softmax, everything in numpy float64."""
    with jax.enable_x64(True):
        t = jnp.asarray(np.asarray(t, float))
        alpha, sigma = (np.asarray(f(t))[:, None] for f in (schedule.alpha, schedule.sigma))
    flat = np.asarray(images, float).reshape(len(images), -1)
    gap = np.asarray(x, float).reshape(len(x), 1, -1) - alpha[..., None] * flat
    log_r = -0.5 * (gap**2).sum(-1) / sigma**2
    if keep is not None:
        log_r = np.where(keep, log_r, -np.inf)
    r = np.exp(log_r - log_r.max(1, keepdims=True))
    x0 = (r / r.sum(1, keepdims=True)) @ flat
    return x0.reshape(np.shape(x))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_exact_is_the_softmax_average_of_the_images_at_any_chunk(name, chunk):
    images, _ = _images()
    s = SCHEDULES[name]()
    t = at(s, [0.05, 0.3, 1.0, 20.0])
    eps = np.random.default_rng(1).normal(size=(4, 4, 4, 1)).astype(np.float32)
    x = np.asarray(corrupt(s, images[:4], eps, t))
    x0, eps_hat, _ = _call(denoisers.exact(images, s, chunk=chunk), x, t, {})
    expected = _brute_force(x, t, images, s)
    np.testing.assert_allclose(x0, expected, atol=2e-5)
    sigma = np.asarray(s.sigma(t), float)[:, None, None, None]
    alpha = np.asarray(s.alpha(t), float)[:, None, None, None]
    np.testing.assert_allclose(eps_hat, (x - alpha * expected) / sigma, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("sigma", [1e-4, 2e-3])
def test_exact_tells_close_images_apart_at_tiny_noise(sigma):
    """Two images 6 sigma apart among values near 1: an expanded square would lose their digits."""
    images = np.ones((2, 8, 8, 1), np.float32)
    images[1, 0, 0, 0] = 1 - 6 * sigma
    x = images * np.float32(1.0)
    x[:, 1, 1, 0] += np.float32(sigma)
    x[:, 0, 0, 0] -= np.float32(2.9 * sigma) * np.asarray([1, -1], np.float32)
    t = jnp.full(2, sigma, jnp.float32)
    x0 = _call(denoisers.exact(images, EDM), x, t, {}).x0
    responsibility = (1 - np.asarray(x0)[:, 0, 0, 0]) / (6 * sigma)
    expected = (1 - _brute_force(x, t, images, EDM)[:, 0, 0, 0]) / (6 * sigma)
    np.testing.assert_allclose(responsibility, expected, atol=0.02)


@pytest.mark.parametrize("sigma", [0.5, 10.0, 80.0])
def test_exact_keeps_its_digits_in_many_dimensions(sigma):
    """3072 dimensions, as CIFAR: the normalising constant must not eat the digits that differ."""
    images, _ = _images(16, (32, 32, 3))
    images = images[:1] + 0.03 * sigma * images  # so alike that none wins
    t = jnp.full(4, sigma, jnp.float32)
    eps = np.random.default_rng(2).normal(size=(4, 32, 32, 3)).astype(np.float32)
    x = images[:4] + np.float32(sigma) * eps
    x0 = _call(denoisers.exact(images, EDM), x, t, {}).x0
    difference = np.abs(np.asarray(x0) - _brute_force(x, t, images, EDM)).max()
    assert difference < 4e-4 * np.abs(images - images[:1]).max()


def test_a_label_selects_its_images_and_the_null_label_all():
    images, labels = _images()
    denoise = denoisers.exact(images, EDM, labels=labels, chunk=8)
    t = jnp.full(4, 2.0)
    x = images[:4] * 1.5
    wanted = jnp.asarray([0, 2, 3, 1])  # 3, one above the largest, is the null label
    keep = (np.asarray(wanted)[:, None] == labels) | (np.asarray(wanted)[:, None] == 3)
    x0 = _call(denoise, x, t, {"label": wanted}).x0
    np.testing.assert_allclose(x0, _brute_force(x, t, images, EDM, keep), atol=1e-5)
    everything = _call(denoise, x, t, {"label": jnp.full(4, 3)})
    same(_call(denoise, x, t, {}), everything)
    other = denoisers.exact(images, EDM, labels=labels, null=77)
    same(_call(other, x, t, {"label": jnp.full(4, 77)}), everything)


def test_a_label_of_no_image_gives_nan_for_that_sample_alone():
    images, labels = _images()
    denoise = denoisers.exact(images, EDM, labels=labels, chunk=8)
    x0 = _call(denoise, images[:4], jnp.full(4, 0.5), {"label": jnp.asarray([0, 9, -1, 1])}).x0
    assert np.isnan(np.asarray(x0)).all(axis=(1, 2, 3)).tolist() == [False, True, True, False]
    assert np.isfinite(np.asarray(x0[0])).all()


def test_without_labels_a_label_is_ignored():
    images, _ = _images()
    denoise, t = denoisers.exact(images, EDM), jnp.full(2, 0.5)
    labelled = _call(denoise, images[:2], t, {"label": jnp.asarray([5, 6])})
    same(labelled, _call(denoise, images[:2], t, {}))


@pytest.mark.parametrize("name", SCHEDULES)
@x64
def test_the_mixtures_eps_is_minus_sigma_times_the_score(name):
    """Tweedie, with the score once by autodiff of log_density and once by hand; by label too."""
    s = SCHEDULES[name]()
    denoise, numbers = mixture_1d(s, labels=True)
    t = jnp.asarray(inside(s, 7))
    a, b = (np.asarray(f(t)) for f in (s.alpha, s.sigma))
    x = np.linspace(-2, 2, 7)[:, None] * (a + b)[:, None]
    for label in (0, 1, 2):  # 2 is the null label
        cond = {"label": np.full(7, label)}
        x0, eps = (np.asarray(p)[:, 0] for p in _call(denoise, x, t, cond)[:2])
        by_autodiff = -b * np.asarray(_score(x, denoise, t, cond))[:, 0]
        np.testing.assert_allclose(eps, by_autodiff, rtol=1e-7, atol=1e-9)
        chosen = None if label == 2 else label
        by_hand = [mixture_score(x[i, 0] / a[i], b[i] / a[i], numbers, chosen) for i in range(7)]
        np.testing.assert_allclose(eps, -b / a * by_hand, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(a * x0 + b * eps, x[:, 0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("label", [None, 1])
@x64
def test_log_density_is_scipys_for_the_noised_mixture(label):
    s = schedules.cosine()
    denoise, (means, variances, weights, labels) = mixture_1d(s, labels=True)
    keep = np.ones(3, bool) if label is None else labels == label
    t, x = jnp.asarray([0.1, 0.5, 0.9]), np.array([0.2, -1.3, 0.7])
    a, b = np.asarray(s.alpha(t))[:, None], np.asarray(s.sigma(t))[:, None]
    spread = np.sqrt(a**2 * variances + b**2)
    p = scipy.stats.norm.pdf(x[:, None], a * means, spread)[:, keep] @ weights[keep]
    cond = {} if label is None else {"label": jnp.full(3, label)}
    ours = _log_density(denoise, jnp.asarray(x)[:, None], t, cond)
    np.testing.assert_allclose(ours, np.log(p / weights[keep].sum()), rtol=1e-9)


@x64
def test_a_gaussian_in_many_dimensions_has_its_density_and_regression():
    s, m, v = schedules.vp_linear(), np.array([0.5, -1.0, 2.0]), 0.3
    denoise = denoisers.mixture(jnp.asarray(m)[None], v, s)
    t, x = jnp.asarray([0.4]), jnp.asarray([[1.0, 0.2, -0.4]])
    a, b = float(s.alpha(t[0])), float(s.sigma(t[0]))
    spread = a * a * v + b * b
    expected = scipy.stats.multivariate_normal(a * m, spread * np.eye(3)).logpdf(x[0])
    np.testing.assert_allclose(denoise.log_density(x, t), expected, rtol=1e-10)
    np.testing.assert_allclose(denoise(x, t).x0[0], m + a * v / spread * (x[0] - a * m), rtol=1e-10)


@x64
def test_the_weights_of_a_mixture_need_not_sum_to_one_nor_fill_a_chunk():
    def make(scale, chunk):
        means, weights = jnp.asarray([[-1.0], [0.3], [1.2]]), scale * np.array([1.0, 2.0, 3.0])
        return denoisers.mixture(means, 0.1, EDM, weights=weights, chunk=chunk)

    x, t = jnp.asarray([[0.1], [0.9]]), jnp.asarray([0.3, 1.0])
    same(_call(make(1.0, 1024), x, t, {}), _call(make(7.0, 2), x, t, {}), 1e-12, 1e-12)
    one, other = (_log_density(d, x, t, {}) for d in (make(7.0, 2), make(1.0, 3)))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_sample_does_not_see_the_rest_of_its_batch():
    images, labels = _images()
    denoise = denoisers.exact(images, EDM, labels=labels, chunk=8)
    t, label = jnp.asarray([0.1, 1.0, 5.0, 50.0]), jnp.asarray([0, 1, 3, 2])
    together = _call(denoise, images[:4], t, {"label": label})
    for i in range(4):
        alone = _call(denoise, images[i : i + 1], t[i : i + 1], {"label": label[i : i + 1]})
        same(alone, jax.tree.map(lambda a, i=i: a[i : i + 1], together), 1e-5, 1e-5)


def test_a_tree_is_one_joint_data_set_with_a_schedule_for_each_leaf():
    """Responsibilities are the product over the leaves: two leaves are one concatenated vector."""
    images, _ = _images(9, (6,))
    tree = {"a": images[:, :2], "b": images[:, 2:]}
    t = jnp.asarray([0.4, 0.9])
    x = {"a": tree["a"][:2] * 0.7, "b": tree["b"][:2] + 0.2}
    joined = np.concatenate([x["a"], x["b"]], 1)
    one = _call(denoisers.exact(images, EDM), joined, t, {})
    two = _call(denoisers.exact(tree, EDM, chunk=4), x, t, {})
    np.testing.assert_allclose(np.concatenate([two.x0["a"], two.x0["b"]], 1), one.x0, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([two.eps["a"], two.eps["b"]], 1), one.eps, atol=2e-5)

    own = {"a": EDM, "b": schedules.cosine()}
    alpha, sigma = (np.asarray(f(t), float)[:, None] for f in (own["b"].alpha, own["b"].sigma))
    log_r = -0.5 * ((x["a"][:, None] - tree["a"]) ** 2).sum(-1) / np.asarray(t)[:, None] ** 2
    log_r += -0.5 * ((x["b"][:, None] - alpha[..., None] * tree["b"]) ** 2).sum(-1) / sigma**2
    r = np.exp(log_r) / np.exp(log_r).sum(1, keepdims=True)
    x0 = _call(denoisers.exact(tree, own), x, t, {}).x0
    same(x0, {k: r @ tree[k] for k in tree}, 1e-4, 1e-5)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "score", "velocity", "edm"])
@pytest.mark.parametrize("name", ["edm", "cosine", "rectified_flow"])
def test_a_network_that_outputs_the_exact_target_is_the_exact_denoiser(name, target):
    """The network sees only c_in x and c_noise, as a trained one does, and inverts them."""
    s = SCHEDULES[name]()
    exact, _ = mixture_1d(s)
    row = parameterization(target, time="logsnr", sigma_data=0.6)

    def apply(params, scaled, c_noise, cond, key):
        assert key is None
        t = s.time(c_noise)
        c_in = row.scale_input(s, jnp.ones_like(scaled), t)
        return params * row.target_of(s, *exact(scaled / c_in, t)[:2], t)

    t = at(s, [0.1, 1.0, 3.0])
    x = jnp.asarray([[0.3], [-1.0], [2.0]])
    made = _call(denoisers.network(apply, jnp.float32(1.0), s, row), x, t, {})
    same(made, _call(exact, x, t, {}), 2e-4, 2e-4)


def test_a_network_gets_its_condition_and_a_time_for_each_sample():
    seen = {}

    def apply(params, x, c_noise, cond, key):
        seen.update(c_noise=c_noise, cond=cond, key=key)
        return x

    denoise = denoisers.network(apply, {}, EDM, parameterization("x0"))
    denoise(jnp.ones((3, 2)), 0.5, {"label": jnp.arange(3)})
    np.testing.assert_array_equal(seen["c_noise"], [0.5] * 3)
    np.testing.assert_array_equal(seen["cond"]["label"], [0, 1, 2])
    denoise.output(jnp.ones((3, 2)), 0.5, {}, jax.random.key(4))
    assert seen["key"] == jax.random.key(4)


def test_new_data_of_the_same_shape_does_not_recompile():
    call = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))
    x, t, cond = jnp.ones((2, 4, 4, 1)), jnp.full(2, 0.5), {"label": jnp.asarray([0, 1])}
    for seed in range(3):
        images, labels = _images(seed=seed)
        made = call(denoisers.exact(images, EDM, labels=(labels + seed) % 3, chunk=8), x, t, cond)
        assert np.isfinite(np.asarray(made.x0)).all()
    assert call._cache_size() == 1


def test_an_exact_denoiser_has_gradients_in_its_images():
    images, _ = _images(5, (2,))
    t, x = jnp.asarray([0.6]), images[:1] * 0.5

    def first(shift):
        moved = jnp.asarray(images).at[2, 0].add(shift)
        return _call(denoisers.exact(moved, EDM), x, t, {}).x0[0, 0]

    by_difference = (first(1e-2) - first(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(first)(0.0), by_difference, rtol=2e-2)


def test_a_plain_function_is_a_denoiser_with_or_without_a_schedule():
    ours = Prediction(1, 2)
    denoise = denoisers.as_denoiser(lambda x, t, cond: ours)
    assert denoise(0, 0) is ours
    assert denoisers.as_denoiser(denoise) is denoise
    assert denoisers.schedule_of(denoise, EDM) is EDM
    assert denoisers.schedule_of(denoisers.function(lambda *_: ours, EDM)) is EDM


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: denoisers.exact(np.zeros((3, 2), np.uint8), EDM), r"uint8; floats .* x / 127.5"),
        (lambda: denoisers.exact({"a": np.zeros(3), "b": np.zeros(4)}, EDM), r"\['b'\] has 4 ent"),
        (lambda: denoisers.exact(np.zeros(3), EDM, labels=[1, 2]), r"labels has 2 .* for 3"),
        (lambda: denoisers.as_denoiser(3), r"denoiser: a callable .*int"),
        (lambda: denoisers.schedule_of(lambda: 0), r"sample: .* no schedule; pass schedule="),
    ],
)  # fmt: skip
def test_what_cannot_denoise_is_refused_by_name(make, said):
    with pytest.raises(UserError, match=said):
        make()
