"""Ring and all-to-all attention are attention: values, gradients, masks, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import x64

from jdiff import models, parallel
from jdiff.errors import UserError
from jdiff.guidance.perturbed_attention import identity_map
from jdiff.guidance.smoothed_energy import smoothed_attention
from jdiff.models.attention import by_head, dot_product
from jdiff.parallel import tokens
from jdiff.parallel.all_to_all import all_to_all
from jdiff.parallel.blockwise import blockwise
from jdiff.parallel.collectives import collectives, counts
from jdiff.parallel.layout import TRANSFORMER, layout, within
from jdiff.parallel.ring import ring
from jdiff.parallel.shardings import of_state

RNG = np.random.default_rng(0)


def laid(**sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return layout(parallel.make(sizes, devices), TRANSFORMER)


def masks(rows, heads, queries, places):
    """A mask with a stretch that no one sees, longer than a device's part; no row sees nothing."""
    mask = RNG.random((rows, heads, queries, places)) < 0.6
    mask[0, ..., places // 4 : places * 3 // 4] = False
    mask[..., -1] = True
    return mask


# Values that spread the logits over -20 to 20, so that no part of a ring has the largest of all.
CASES = {
    "blocks": ({"sequence": 4}, (2, 24, 4, 3), None),
    "grid, heads split": ({"sequence": 2, "tensor": 2}, (2, 4, 3, 4, 5), None),
    "batch split": ({"sequence": 2, "fsdp": 2}, (2, 8, 4, 3), masks(2, 1, 1, 8)),
    "batch that does not divide": ({"sequence": 2, "data": 2}, (3, 8, 4, 3), masks(3, 1, 8, 8)),
    "a mask a head": ({"sequence": 2, "tensor": 2}, (2, 8, 4, 3), masks(2, 4, 8, 8)),
    "sequences whole": ({"tensor": 2, "data": 2}, (2, 6, 4, 3), masks(2, 1, 1, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@x64
def test_values_and_gradients_are_those_of_plain_attention(name):
    sizes, shape, mask = CASES[name]
    over = laid(**sizes)
    q, k, v, slope = (jnp.asarray(RNG.standard_normal(shape)) * 3 for _ in range(4))
    masked = {} if mask is None else {"mask": jnp.asarray(mask)}

    @jax.jit
    def run(q, k, v):
        def loss(kernel):
            def of(q, k, v):
                out = kernel(q, k, v, **masked)
                return (out * slope).sum(), out

            return jax.value_and_grad(of, (0, 1, 2), has_aux=True)(q, k, v)

        block = 2 if name == "blocks" else 1024  # keys at a time, of a device's 6
        exchanged = all_to_all(over, by_head if name == "blocks" else blockwise)
        return [loss(kernel) for kernel in (dot_product, ring(over, block), exchanged)]

    plain, *others = run(q, k, v)
    for other in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other)):
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


@x64
def test_a_query_that_sees_nothing_gets_the_mean_and_gives_no_gradient_to_keys():
    over, mask = laid(sequence=4), np.ones((1, 1, 8, 8), bool)
    mask[0, 0, 3] = False
    q, k, v = RNG.standard_normal((3, 1, 8, 2, 3))
    slope = np.zeros_like(q)
    slope[0, 3] = 1.0

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(functools.partial(ring(over), mask=mask), q, k, v)
        return out, *back(slope)

    out, dq, dk, dv = map(np.asarray, run(q, k, v))
    np.testing.assert_allclose(out[0, 3], v[0].mean(0), rtol=1e-12)
    assert not np.any(dq) and not np.any(dk)
    np.testing.assert_allclose(dv, np.full(dv.shape, 1 / 8), rtol=1e-12)


def test_half_precision_stays_near_full():
    """Sums and the softmax are float32, so the error is that of rounding the inputs and outputs."""
    q, k, v = (jnp.asarray(RNG.standard_normal((2, 64, 2, 8)), jnp.bfloat16) for _ in range(3))
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    out = jax.jit(ring(laid(sequence=4)))(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), dot_product(*wide), atol=0.01)


def test_what_long_sequences_send_and_hold():
    """8,192 tokens on 4 devices: what moves is counted, memory is a fraction of the maps'.

    A ring sends a part of k and v a turn, and their gradients; an exchange q, k, v and the result.
    """
    over, length = laid(sequence=4), 8192
    shapes = [jax.ShapeDtypeStruct((1, length, 4, 8), np.float32)] * 3
    tokens = jax.NamedSharding(over.mesh, jax.P(None, "sequence"))

    def compiled(kernel):
        step = jax.grad(lambda q, k, v: (kernel(q, k, v) ** 2).sum(), (0, 1, 2))
        found = jax.jit(step, in_shardings=tokens, out_shardings=tokens).lower(*shapes).compile()
        return collectives(found.as_text()), found.memory_analysis().temp_size_in_bytes

    _, plain = compiled(dot_product)
    maps = 4 * (length // 4) * length * 4  # bytes of the heads' maps for a device's queries
    assert plain > maps
    sent, memory = compiled(ring(over, block=512))
    assert memory < maps / 4
    assert counts(sent) == {"collective-permute": 8}
    assert {c.bytes for c in sent} == {length // 4 * 4 * 8 * 4}  # of a device's k
    # k and v round but for the way home, forward and backward; dk and dv all the way.
    assert sum(c.trips for c in sent) == 2 * 3 + 2 * 3 + 2 * 4
    sent, memory = compiled(all_to_all(over))
    assert memory < maps
    assert set(counts(sent)) == {"all-to-all"}
    assert sum(len(c.arrays) for c in sent) == 4 * (4 + 4)  # of four slices each


exchange = functools.partial(all_to_all, kernel=dot_product)


@pytest.mark.parametrize(
    ("kernel", "shape", "told"),
    [
        (ring, (2, 18, 4, 3), "18 queries do not divide over 4 .*16 and 20 do"),
        (exchange, (2, 2, 4, 3), "2 queries .*; 4 does"),
        (exchange, (2, 8, 6, 3), "6 heads .*4 and 8 do.*ring"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(kernel, shape, told):
    q = jnp.zeros(shape)
    with pytest.raises(UserError, match=told):
        kernel(laid(sequence=4))(q, q, q)


def test_kernels_of_one_layout_are_equal():
    assert ring(laid(sequence=4)) == ring(laid(sequence=4))
    assert hash(ring(laid(sequence=4))) == hash(ring(laid(sequence=4)))
    assert ring(laid(sequence=4)) != ring(laid(sequence=2))


def test_sequences_are_joined_part_by_part_and_taken_apart():
    text, image = jnp.arange(4.0).reshape(1, 4, 1), 10 + jnp.arange(8.0).reshape(1, 8, 1)
    with within(laid(sequence=2)):
        joined = tokens.join(text, image)
        again = tokens.part(joined, 4)
        filled, seen = tokens.fill(text[:, :3])
        places = tokens.mask(seen, 4)
    assert joined.ravel().tolist() == [0, 1, 10, 11, 12, 13, 2, 3, 14, 15, 16, 17]
    for a, b in zip(again, (text, image)):
        np.testing.assert_array_equal(a, b)
    assert filled.ravel().tolist() == [0, 1, 2, 0]
    assert places.ravel().tolist() == [True] * 4 + [True, False] + [True] * 2
    assert tokens.join(text, image).ravel().tolist() == [*range(4), *range(10, 18)]
    assert tokens.mask(4, 8) is None


def dit(rngs, **changes):
    fields = {"in_channels": 2, "width": 16, "depth": 3, "heads": 4, "scan": True} | changes
    return models.DiT(**fields, rngs=rngs)


def test_layers_whose_attention_is_perturbed_stay_so_on_split_tokens():
    """PAG in one layer, SEG (along the image's rows and columns) in another, a ring in the rest."""
    over = laid(tensor=2, sequence=2)
    apply, shapes = models.abstract(dit)
    params = jax.tree.map(lambda s: 0.3 * RNG.standard_normal(s.shape, np.float32), shapes)
    x, t = RNG.standard_normal((2, 8, 8, 2), np.float32), np.ones(2, np.float32)
    blurred = functools.partial(smoothed_attention, sigma=2.0)

    def perturbed(apply):
        first = apply.with_attention(identity_map, "blocks/0")
        return jax.jit(first.with_attention(blurred, "blocks/1"))

    expected = perturbed(apply)(params, x, t)
    split = apply.with_layout(over).with_attention(ring(over), "attention")
    params = jax.device_put(params, of_state(shapes, models.axes(dit), over))
    np.testing.assert_allclose(perturbed(split)(params, x, t), expected, atol=2e-5)


def test_blurring_a_sequence_out_of_order_is_refused():
    q = jnp.zeros((1, 8, 2, 4))
    with within(laid(sequence=2)), pytest.raises(UserError, match="mesh.sequence=1"):
        smoothed_attention(q, q, q, sigma=1.0)


@pytest.mark.parametrize(
    ("sizes", "fields", "told"),
    [
        ({"tensor": 4}, {"heads": 2}, "mesh.tensor=4: 2 heads do not divide .*; 4 does"),
        ({"sequence": 4}, {"patch": 4}, "mesh.sequence=4: 2 rows of tokens .*; 4 does"),
    ],
)
def test_networks_that_do_not_divide_are_refused(sizes, fields, told):
    apply, shapes = models.abstract(functools.partial(dit, **fields))
    x, t = jax.ShapeDtypeStruct((2, 8, 8, 2), np.float32), jax.ShapeDtypeStruct((2,), np.float32)
    with pytest.raises(UserError, match=told):
        jax.eval_shape(apply.with_layout(laid(**sizes)), shapes, x, t)
