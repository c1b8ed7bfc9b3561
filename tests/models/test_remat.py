"""Remat: every policy gives the gradients of none, and keeps less than the one before."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models
from jdiff.errors import UserError
from jdiff.models import layers, remat

NAMES = list(remat.POLICIES)  # from the most memory to the least

DIT = {"in_channels": 2, "patch": 2, "width": 32, "depth": 3, "heads": 2}
UNET = {"image_size": 8, "channels": 16, "multipliers": (1, 2), "blocks": 1, "style": "ddpm"}
BUILDS = {
    "unet": functools.partial(models.UNet, **UNET, attention_sizes=(8,)),
    "unrolled": functools.partial(models.DiT, **DIT),
    "scanned": functools.partial(models.DiT, **DIT, scan=True),
}


def case(family, policy):
    """(loss, params, x, t) of a network under a policy, with every weight random."""
    apply, params = models.abstract(lambda rngs: BUILDS[family](remat=policy, rngs=rngs))
    random = np.random.default_rng(1)
    draw = lambda w: 0.2 * random.standard_normal(w.shape).astype(np.float32)
    x = draw(jax.ShapeDtypeStruct((2, 8, 8, 3) if family == "unet" else (2, 16, 16, 2), "float32"))
    loss = lambda params, x, t: jnp.square(apply(params, x, t)).mean()
    return loss, jax.tree.map(draw, params), x, np.asarray([3.0, 500.0], np.float32)


@functools.cache
def compiled(family, policy):
    """The compiled gradient, and its arguments."""
    loss, *args = case(family, policy)
    return jax.jit(jax.grad(loss)).lower(*args).compile(), args


@pytest.mark.parametrize(
    ("family", "policy"),
    [*(("scanned", name) for name in NAMES[1:]), ("unrolled", "full"), ("unet", "dots_no_batch")],
)
def test_gradients_are_those_of_no_remat(family, policy):
    (plain, args), (rematted, _) = compiled(family, "none"), compiled(family, policy)
    got = dict(jax.tree_util.tree_leaves_with_path(rematted(*args)))
    for path, want in jax.tree_util.tree_leaves_with_path(plain(*args)):
        scale = np.abs(want).max()
        assert scale > 0
        np.testing.assert_allclose(got[path] / scale, want / scale, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize("family", BUILDS)
def test_each_policy_keeps_less_than_the_one_before(family):
    """Bytes that the forward pass hands to the backward pass: the leaves of jax.vjp's function."""

    def kept(policy):
        loss, *args = case(family, policy)
        residuals = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *args)
        return sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(residuals))

    sizes = [kept(name) for name in NAMES]
    assert all(a > b for a, b in zip(sizes, sizes[1:])), sizes
    assert kept(False) == sizes[0] and kept(True) == sizes[-1]


def test_less_kept_is_less_memory_in_the_compiled_program():
    """Of the scanned network: on CPU, XLA undoes the recomputation of unrolled blocks."""
    sizes = [compiled("scanned", name)[0].memory_analysis().temp_size_in_bytes for name in NAMES]
    assert all(a > b for a, b in zip(sizes, sizes[1:])), sizes


def test_what_each_policy_keeps():
    """Of a product with weights [2], one in a batch [1, 3, 4] and a convolution [1, 1, 5]."""

    def block(w, a, b, kernel):
        h = jnp.sin(w @ jnp.ones(7))
        m = jnp.sin(jnp.einsum("bij,bjk->bik", a, b))
        c = jnp.sin(jax.lax.conv(jnp.ones((1, 1, 5)), kernel, (1,), "SAME"))
        return h.sum() + m.sum() + c.sum()

    args = jnp.ones((2, 7)), jnp.ones((1, 3, 6)), jnp.ones((1, 6, 4)), jnp.ones((1, 1, 3))

    def kept(policy):
        f = lambda *args: jax.vjp(remat.checkpoint(block, policy), *args)[1]
        shapes = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(f, *args))}
        return shapes & {(2,), (1, 3, 4), (1, 1, 5)}

    assert kept("full") == set()
    assert kept("dots_no_batch") == {(2,), (1, 1, 5)}
    assert kept("dots") == kept("none") == {(2,), (1, 3, 4), (1, 1, 5)}


def test_unknown_policies_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="remat 'dot' is not known. Did you mean 'dots'"):
        models.abstract(lambda rngs: models.DiT(**DIT, remat="dot", rngs=rngs))
    with pytest.raises(UserError, match="remat 'ful' is not known. Did you mean 'full'"):
        models.abstract(lambda rngs: models.UNet(**UNET, remat="ful", rngs=rngs))
    with pytest.raises(UserError, match="remat=3 must be True, False or a name: dots"):
        layers.run(None, remat=3)
