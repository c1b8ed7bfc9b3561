"""The FLOP counter: closed forms, the papers' figures, XLA's own count, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jdiff import models
from jdiff.errors import UserError
from jdiff.models.attention import dot_product
from jdiff.models.flops import PEAKS, flops, mfu, training_flops


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def xla(function, *args):
    """The compiler's count, before it optimises."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def network(module, batch=1, size=32, **fields):
    """(apply, shapes of the params and inputs) of a network on images of that size."""
    apply, params = models.abstract(lambda rngs: module(**fields, rngs=rngs))
    x, t = shape(batch, size, size, fields["in_channels"]), shape(batch)
    cond = {"label": shape(batch, dtype="int32")} if fields.get("num_classes") else None
    return apply, params, x, t, cond


def dit(name, batch=1, **changes):
    return network(models.DiT, batch, **models.dit_imagenet(name, **changes))


SMALL = {"in_channels": 4, "width": 32, "depth": 3, "heads": 2, "num_classes": 10}


# Closed forms


def test_products_count_two_a_multiply_add():
    assert flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert flops(jnp.matmul, shape(4, 3, 5), shape(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    outer = lambda a, b: jnp.einsum("bi,bj->bij", a, b)
    assert flops(outer, shape(4, 3), shape(4, 5)) == 2 * 4 * 3 * 5


def conv(x, w, stride=1, groups=1, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_convolutions_and_their_gradients_count_the_taps(stride, groups):
    """Each gradient, of a strided or grouped one too, takes as many operations as the forward."""
    f = functools.partial(conv, stride=stride, groups=groups)
    x, w = shape(2, 16, 8, 4), shape(3, 3, 4 // groups, 12)
    once = 2 * (2 * (16 // stride) * (8 // stride) * 12) * (9 * 4 // groups)
    assert flops(f, x, w) == once
    loss = lambda x, w: jnp.square(f(x, w)).sum()
    assert flops(jax.grad(loss, 0), x, w) == 2 * once
    assert flops(jax.grad(loss, 1), x, w) == 2 * once


def test_dilated_convolutions_count_no_inserted_zeros():
    # 8 pixels with a zero between each two, and the kernel's 3 taps: every second one is a pixel.
    f = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), [(1, 2)], lhs_dilation=(2,))
    assert flops(f, shape(1, 1, 8), shape(1, 1, 3)) == 2 * 8 * 3


def test_loops_and_branches():
    x, w = shape(6, 6), shape(5, 6, 6)
    once = 2 * 6**3
    assert flops(lambda x, w: jax.lax.scan(lambda h, w: (h @ w, None), x, w)[0], x, w) == 5 * once
    nested = lambda x: jax.lax.fori_loop(0, 4, lambda _, h: jax.jit(jnp.matmul)(h, h), x)
    assert flops(nested, x) == 4 * once
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert flops(lambda i, x: jax.lax.switch(i, branches, x), 0, x) == 2 * once
    assert flops(jax.checkpoint(jnp.matmul), x, x) == once
    assert flops(jax.vmap(lambda x: jax.nn.relu(x @ x)), shape(3, 6, 6)) == 3 * once


def test_devices_of_a_shard_map_count_together():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")
    f = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec)
    assert flops(f, shape(4, 5), shape(5, 7)) == 2 * 4 * 5 * 7


def test_training_of_a_perceptron_is_three_forwards_less_the_gradient_of_its_input():
    widths, batch = (5, 7, 11, 3), 4
    params = [shape(a, b) for a, b in zip(widths, widths[1:])]
    apply = lambda params, x: functools.reduce(lambda h, w: jnp.tanh(h @ w), params, x)
    forward = sum(2 * batch * a * b for a, b in zip(widths, widths[1:]))
    assert flops(apply, params, shape(batch, 5)) == forward
    assert training_flops(apply, params, shape(batch, 5)) == 3 * forward - 2 * batch * 5 * 7


# The papers


# Peebles and Xie 2022, table 4, ImageNet 256: "Gflops", which are billions of multiply-adds.
DIT = {
    "S/8": 0.36, "S/4": 1.41, "S/2": 6.06, "B/8": 1.42, "B/4": 5.56, "B/2": 23.01,
    "L/8": 5.01, "L/4": 19.70, "L/2": 80.71, "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64,
}  # fmt: skip


@pytest.mark.parametrize("name", DIT)
def test_dit_takes_the_published_gflops(name):
    assert flops(*dit(name, scan=True)) / 2e9 == pytest.approx(DIT[name], rel=0.01)


def test_dit_at_512_pixels():
    args = network(models.DiT, size=64, **models.dit_imagenet("XL/2", scan=True))
    assert flops(*args) / 2e9 == pytest.approx(524.60, rel=0.01)


def test_adm_takes_the_published_gflops():
    """ADM on 64 x 64 x 4 latents, configuration A of EDM2 (Karras et al. 2024, table 1)."""
    fields = models.adm_imagenet64(in_channels=4)
    assert flops(*network(models.UNet, size=64, **fields)) / 2e9 == pytest.approx(110.4, rel=0.01)


# XLA


def test_xla_counts_a_product_alike():
    args = shape(64, 32), shape(32, 16)
    assert flops(jnp.matmul, *args) == xla(jnp.matmul, *args)


def test_xla_counts_a_convolution_alike_but_for_its_border():
    """XLA leaves out the taps that meet padding: of 3 taps on 8 pixels, 2 of 24 on each axis."""
    args = shape(2, 8, 8, 4), shape(3, 3, 4, 6)
    inside = functools.partial(conv, padding="VALID")
    assert flops(inside, *args) == xla(inside, *args)
    assert flops(conv, *args) * (22 / 24) ** 2 == pytest.approx(xla(conv, *args), rel=1e-12)


def test_xla_counts_an_unrolled_dit_alike_but_for_elementwise_operations():
    """They are per number of an activation and products per number and width: 1 % at width 384."""
    for args, least in ((dit("S/8", batch=2), 0.985), (dit("S/2", depth=2), 0.97)):
        assert least < flops(*args) / xla(*args) < 1
    value = lambda apply: lambda *args: apply(*args).sum()
    apply, *args = dit("S/8", batch=2, depth=2)
    ratio = training_flops(apply, *args) / xla(jax.value_and_grad(value(apply)), *args)
    assert 0.97 < ratio < 1


def test_xla_counts_an_unrolled_unet_alike_but_for_borders_and_elementwise_operations():
    """The border takes up to 16 % where images are 8 x 8; the rest adds less at width 64."""
    fields = models.adm_imagenet64(in_channels=3, channels=64, blocks=1)
    args = network(models.UNet, size=64, **fields)
    assert flops(*args) / xla(*args) == pytest.approx(1.0, abs=0.06)


# What a network is made of does not change its count


def test_scanned_and_rematted_networks_count_like_unrolled_ones():
    counts = [
        training_flops(*network(models.DiT, **SMALL, scan=scan, remat=policy))
        for scan in (False, True)
        for policy in ("none", "dots_no_batch", "full")
    ]
    assert len(set(counts)) == 1


def test_the_gradient_itself_counts_what_remat_computes_twice():
    """The forward passes of all blocks."""

    def executed(policy):
        apply, *args = network(models.DiT, **SMALL, scan=True, remat=policy)
        return flops(jax.grad(lambda *args: apply(*args).sum()), *args)

    apply, *args = network(models.DiT, **SMALL, scan=True)
    embed = flops(*network(models.DiT, **(SMALL | {"depth": 1}), scan=True))
    block = (flops(apply, *args) - embed) / 2
    assert executed("none") == training_flops(apply, *args)
    assert executed("dots") == executed("none")
    assert executed("full") == executed("none") + 3 * block


def test_batches_scale_the_count():
    assert flops(*dit("S/8", batch=6)) == 6 * flops(*dit("S/8"))


# What is refused


def test_products_in_a_while_loop_are_refused():
    f = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
    with pytest.raises(UserError, match="while loop of unknown length.*scan"):
        flops(f, shape(3, 3))
    halve = lambda x: jax.lax.while_loop(lambda x: x.sum() > 9, lambda x: x / 2, x)
    assert flops(halve, shape(3, 3)) == 0


def test_opaque_kernels_are_refused_and_a_plain_one_counts():
    def opaque(q, k, v):
        return jax.pure_callback(lambda q: q, q, q)

    apply, *args = network(models.DiT, **SMALL)
    with pytest.raises(UserError, match="pure_callback is a kernel.*with_attention"):
        flops(apply.with_attention(opaque), *args)
    plain = apply.with_attention(opaque).with_attention(dot_product)
    assert flops(plain, *args) == flops(apply, *args)


# Utilisation


def test_mfu_is_the_fraction_of_the_peak():
    assert mfu(1e12, 0.5, 4e12) == 0.5
    assert mfu(1e12, 0.5, 4e12, devices=4) == 0.125
    assert mfu(PEAKS["h100"], 2.0, "h100") == 0.5
    with pytest.raises(UserError, match="peak 'h10' is not known. Did you mean 'h100'"):
        mfu(1e12, 1.0, "h10")
    with pytest.raises(UserError, match="seconds=0"):
        mfu(1e12, 0.0, "h100")
