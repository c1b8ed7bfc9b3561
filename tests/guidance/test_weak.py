"""Guidance by a weakened self: what the weak member computes, and what is shared."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from closed_forms import same

from jdiff import denoisers, grids, guidance, models, sample, sampling, schedules, solvers
from jdiff.errors import UserError
from jdiff.guidance.perturbed_attention import identity_map
from jdiff.guidance.smoothed_energy import blur, smoothed_attention
from jdiff.models.attention import dot_product
from jdiff.predictions import parameterization

EDM = schedules.edm()
NULL = {"label": 2}
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
T, COND = jnp.asarray([0.5, 3.0]), {"label": jnp.asarray([0, 1])}

CALL = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))


def build(rngs, depth=3):
    return models.DiT(width=16, depth=depth, heads=2, patch=2, num_classes=2, rngs=rngs)


@functools.cache
def network():
    apply, params = models.init(build, jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.2 * random.standard_normal(w.shape), params)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    return denoisers.network(apply, params, EDM, parameterization("edm"))


def edited(apply, params=None):
    net = network()
    return denoisers.network(apply, params or net.params, EDM, net.parameterization)


def identity(q, k, v):
    return v


def mean_query(q, k, v):
    return dot_product(jnp.broadcast_to(q.mean((1, 2), keepdims=True), q.shape), k, v)


def shallow():
    """The network without its middle block, built as such."""
    params = network().params
    blocks = {"0": params["blocks"]["0"], "1": params["blocks"]["2"]}
    apply, _ = models.abstract(functools.partial(build, depth=2))
    return edited(apply, params | {"blocks": blocks})


WEAK = {
    "perturbed": (
        lambda: edited(network().apply.with_attention(identity, "blocks/1")),
        lambda d, w: guidance.perturbed_attention(d, w, "blocks/1"),
    ),
    "smoothed": (
        lambda: edited(network().apply.with_attention(mean_query)),
        lambda d, w: guidance.smoothed_energy(d, w, math.inf),
    ),
    "skipping": (
        shallow,
        lambda d, w: guidance.skip_layer(d, w, "blocks/1"),
    ),
}


@pytest.mark.parametrize("name", WEAK)
def test_the_weak_member_and_the_extrapolation_from_it(name):
    by_hand, guided = WEAK[name]
    good, bad = CALL(network(), X, T, COND), CALL(by_hand(), X, T, COND)
    assert np.abs(good.x0 - bad.x0).max() > 1e-3
    for w in (0.0, 1.0, 3.0):
        wanted = jax.tree.map(lambda b, g, w=w: b + w * (g - b), bad, good)
        same(CALL(guided(network(), w), X, T, COND), wanted, rtol=1e-4, atol=2e-5)


def test_the_weak_members_are_denoisers_of_their_own():
    makers = (
        guidance.perturbed,
        guidance.skipping,
        lambda d, where: guidance.smoothed(d, 2.0, where),
    )
    for make, (_, guided) in zip(makers, (WEAK["perturbed"], WEAK["skipping"], WEAK["smoothed"])):
        weak = make(network(), "blocks/1")
        assert type(weak) is type(guided(network(), 2.0).weak)
        assert weak.schedule is EDM
        assert weak.where == "blocks/1"


def test_without_blur_the_smoothed_network_is_the_network():
    same(CALL(guidance.smoothed(network(), 0.0), X, T, COND), CALL(network(), X, T, COND), 1e-4)


def test_blur_is_gaussian_keeps_the_mean_and_composes():
    q = np.random.default_rng(0).normal(size=(1, 9, 6, 1, 2)).astype(np.float32)
    for c in range(2):
        wanted = scipy.ndimage.gaussian_filter(q[0, ..., 0, c], 1.5, truncate=8)  # mirrors, too
        np.testing.assert_allclose(blur(q, 1.5)[0, ..., 0, c], wanted, atol=1e-4)
    for sigma in (0.3, 5.0):
        np.testing.assert_allclose(blur(q, sigma).mean((1, 2)), q.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(blur(blur(q, 1.2), 0.5), blur(q, 1.3), atol=5e-6)
    np.testing.assert_allclose(blur(q, 0.0), q, atol=5e-6)
    mean = np.broadcast_to(q.mean((1, 2), keepdims=True), q.shape)
    np.testing.assert_allclose(blur(q, math.inf), mean, atol=5e-6)


def test_scales_and_blurs_of_another_value_do_not_recompile_and_weights_are_held_once():
    times = grids.karras(EDM, 3)

    def draw(scale, sigma):
        guided = guidance.smoothed_energy(network(), scale, sigma, "blocks/0")
        leaves = jax.tree.leaves(guided)
        held = [leaf for leaf in leaves if any(leaf is w for w in jax.tree.leaves(network()))]
        assert len(held) == len(jax.tree.leaves(network()))
        assert len(leaves) == len(held) + 2  # scale and sigma
        return sample(
            jax.random.key(0), guided, shape=(8, 8, 3), cond=COND, times=times,
            solver=solvers.ddim(),
        )  # fmt: skip

    first = draw(2.0, 1.0)
    compiled = sampling._run._cache_size()
    others = [draw(3.0, 1.0), draw(2.0, math.inf)]
    assert sampling._run._cache_size() == compiled
    assert all(np.abs(other - first).max() > 1e-3 for other in others)


def test_it_composes_with_classifier_free_guidance():
    """Applied to cfg both members are guided; the papers' sum is a product of three experts."""
    c, u, p = (
        CALL(d, X, T, COND).x0
        for d in (
            network(), guidance.fixed(network(), NULL), guidance.perturbed(network(), "blocks/1")
        )
    )  # fmt: skip
    g, s = 2.0, 0.7
    experts = [
        network(),
        guidance.fixed(network(), NULL),
        guidance.perturbed(network(), "blocks/1"),
    ]
    made = CALL(guidance.product(experts, [g + s, 1 - g, -s]), X, T, COND)
    np.testing.assert_allclose(made.x0, u + g * (c - u) + s * (c - p), rtol=1e-3, atol=1e-4)
    pu = CALL(guidance.fixed(guidance.perturbed(network(), "blocks/1"), NULL), X, T, COND).x0
    both = guidance.perturbed_attention(guidance.cfg(network(), g, NULL), 1 + s, "blocks/1")
    good, bad = u + g * (c - u), pu + g * (p - pu)
    made = CALL(both, X, T, COND)
    np.testing.assert_allclose(made.x0, bad + (1 + s) * (good - bad), rtol=1e-3, atol=1e-4)


class Foreign:
    """A network that jdiff did not make."""

    def __call__(self, params, x, t, cond, key=None):
        return x


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: guidance.perturbed_attention(lambda *_: 0, 2.0),
            "perturbed_attention: .* no netw",
        ),
        (lambda: guidance.skip_layer(network(), 2.0, "blocks/7"), "blocks/7.*blocks/0, blocks/1"),
        (lambda: guidance.smoothed_energy(network(), 2.0, -1.0), "smoothed_energy: sigma=-1.0"),
        (lambda: guidance.perturbed(edited(Foreign(), {"w": T})), "'Foreign' .* 'with_attention'"),
    ],
)
def test_what_cannot_be_weakened_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_mask_of_the_network_is_kept():
    """Padding that the model does not see, its smoothed self does not see either."""
    q, k, v = jax.random.normal(jax.random.key(2), (3, 2, 5, 2, 4))
    mask = jnp.arange(5)[None, None, None, :] < 3
    unblurred = smoothed_attention(q, k, v, sigma=0.0, mask=mask)
    np.testing.assert_allclose(unblurred, dot_product(q, k, v, mask=mask), atol=1e-6)
    assert jnp.array_equal(identity_map(q, k, v, mask=mask), v)
