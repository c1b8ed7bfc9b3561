"""Replaced modules: what they compute, that the weights are shared, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdiff import models
from jdiff.errors import UserError
from jdiff.models.attention import Attention
from jdiff.models.replace import Put, SwapKernel, find, replace
from jdiff.models.unet_blocks import STYLES, Block

X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
T = jnp.asarray([0.1, 0.9])


def dit(rngs, **changes):
    fields = {"width": 16, "depth": 3, "heads": 2, "patch": 4} | changes
    return models.DiT(**fields, rngs=rngs)


def unet(rngs):
    fields = {"image_size": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1}
    return models.UNet(**fields, attention_sizes=(4,), rngs=rngs)


def passthrough(q, k, v):
    return v


def nothing(q, k, v):
    return jnp.zeros_like(q)


def double(module):
    return lambda h: 2 * module(h)


CALL = jax.jit(lambda apply, params: apply(params, X, T, {}), static_argnums=0)


@pytest.fixture
def network(randomise):
    def make(build):
        apply, params = models.init(build, jax.random.key(0))
        return apply, randomise(params)

    return make


def test_identity_attention_passes_the_values_on(randomise):
    """A U-Net block whose attention map is the identity adds project(W_v norm(x)), by hand."""
    fields = {"width": 12, "dropout": 0.0, "style": STYLES["ddpmpp"], "attend": True}
    build = lambda rngs: Block(8, 8, **fields, dtype=jnp.float32, rngs=rngs)
    apply, weights = models.init(build, jax.random.key(0))
    weights = randomise(weights)
    x, c = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8))), jnp.ones((2, 12))
    out = {}
    for kernel in (passthrough, nothing):
        block = Put("attention", SwapKernel(kernel))(apply.merge(weights))
        out[kernel] = np.asarray(block(x, c, None))
    w = jax.tree.map(np.asarray, weights)
    scale = STYLES["ddpmpp"].skip_scale
    before = out[nothing] / scale - w["project"]["bias"]  # x ahead of the attention
    groups = before.reshape(2, 16, 2, 4)
    gap = groups - groups.mean((1, 3), keepdims=True)
    normal = (gap / np.sqrt((gap**2).mean((1, 3), keepdims=True) + 1e-6)).reshape(before.shape)
    normal = normal * w["norm3"]["scale"] + w["norm3"]["bias"]
    values = normal @ w["qkv"]["kernel"][0, 0, :, 16:] + w["qkv"]["bias"][16:]
    added = values @ w["project"]["kernel"][0, 0] + w["project"]["bias"]
    np.testing.assert_allclose(out[passthrough], (before + added) * scale, atol=1e-5)
    assert np.abs(added).max() > 0.01


@pytest.mark.parametrize(
    ("where", "edit"),
    [
        ("blocks/1", "attention"),
        (".*", "attention"),
        ("blocks/[02]", "block"),
        ("blocks/1", "both"),
    ],
)
def test_layers_of_a_scanned_stack_are_replaced_one_by_one(network, where, edit):
    def edited(apply):
        if edit != "block":
            apply = apply.with_attention(passthrough, where)
        return apply if edit == "attention" else apply.without_blocks(where.replace("1", "2"))

    apply, params = network(dit)
    scanned, _ = models.abstract(functools.partial(dit, scan=True, remat=True))
    expected = CALL(edited(apply), params)
    out = CALL(edited(scanned), models.stack_blocks(params))
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert np.abs(expected - CALL(apply, params)).max() > 1e-3


def test_a_skipped_block_leaves_the_network_of_the_others(network):
    apply, params = network(dit)
    shallow, _ = models.abstract(functools.partial(dit, depth=2))
    blocks = {"0": params["blocks"]["0"], "1": params["blocks"]["2"]}
    expected = CALL(shallow, params | {"blocks": blocks})
    np.testing.assert_allclose(CALL(apply.without_blocks("blocks/1"), params), expected, atol=1e-6)


def test_the_weights_are_shared_and_unused_ones_have_no_gradient(network):
    apply, params = network(unet)
    weak = apply.with_attention(passthrough, "middle")
    assert weak.paths == apply.paths  # the very same tree serves both
    loss = lambda params: jnp.sum(weak(params, X, T, {}) ** 2)
    kernel = jax.jit(jax.grad(loss))(params)["middle"]["0"]["qkv"]["kernel"][0, 0]
    queries_and_keys, values = kernel[:, :32], kernel[:, 32:]
    assert not np.any(queries_and_keys)
    assert np.all(np.abs(values).max(0) > 0)


def test_replacing_twice_is_equal_and_compiles_once(network):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(apply, params):
        traces.append(1)
        return apply(params, X, T, {})

    for _ in range(2):
        apply, params = models.init(dit, jax.random.key(0))
        run(apply.with_attention(passthrough, "blocks/0"), params)
    assert len(traces) == 1
    one, other = apply.with_attention(passthrough, "blocks/0"), apply.with_attention(passthrough)
    assert len({apply, one, other, apply.without_blocks("blocks/0")}) == 4
    assert models.split(apply.merge(params))[0] == apply  # the plain network is as it was


def test_any_module_can_be_replaced(network):
    apply, params = network(dit)
    np.testing.assert_allclose(
        CALL(replace(apply, "out", double), params), 2 * CALL(apply, params), rtol=1e-5
    )


def test_modules_are_found_by_whole_steps_of_their_path():
    deep = models.abstract(functools.partial(dit, depth=12, scan=True))[0].skeleton()
    assert find(deep, "blocks/1", Attention) == ["blocks/1/attention"]
    assert find(deep, "blocks/1[01]", Attention) == ["blocks/10/attention", "blocks/11/attention"]
    assert len(find(deep, kind=Attention)) == 12
    images = models.abstract(unet)[0].skeleton()
    assert find(images, "middle", Attention) == ["middle/0/attention"]
    assert find(images, "middle|encoder", nnx.List) == ["encoder", "encoder/0/blocks", "encoder/1/blocks", "middle"]  # fmt: skip  # noqa: E501


def test_replacements_that_cannot_be_made_are_refused(network):
    apply, params = network(unet)
    with pytest.raises(UserError, match=r"no Attention .* where='centre'.*middle/0/attention"):
        apply.with_attention(passthrough, "centre")
    with pytest.raises(UserError, match=r"'middle\(' is no regular expression"):
        apply.with_attention(passthrough, "middle(")
    with pytest.raises(UserError, match="cannot be skipped"):
        apply.without_blocks("decoder")(params, X, T)
