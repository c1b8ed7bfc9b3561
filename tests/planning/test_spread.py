"""Shardings through single operations, and what the devices say for them."""

import jax
import jax.numpy as jnp
import pytest

from jdiff.parallel.collectives import Collective
from jdiff.planning import trace
from jdiff.planning.program import flatten
from jdiff.planning.spread import Message, regroup, spread

SIZES = {"data": 2, "fsdp": 4, "tensor": 2, "sequence": 2}
MESH = trace.abstract(SIZES, 32)
P = jax.sharding.PartitionSpec


def said(function, *args):
    """(messages, spec of the results) of a function; args: (shape, spec of each dimension)."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in args]
    program = flatten(jax.make_jaxpr(function)(*shapes))
    messages = spread(program, [spec for _, spec in args], SIZES)
    return messages, [program.values[v].spec for v in program.outputs]


BATCH = ("data", "fsdp")
NONE = ()


def test_a_product_of_a_split_batch_says_nothing():
    messages, (spec,) = said(jnp.matmul, ((64, 8), (BATCH, NONE)), ((8, 6), (NONE, ("tensor",))))
    assert messages == [] and spec == (BATCH, ("tensor",))


def test_a_split_sum_is_added_up():
    messages, (spec,) = said(
        jnp.matmul, ((64, 8), (BATCH, ("tensor",))), ((8, 6), (("tensor",), NONE))
    )
    assert spec == (BATCH, NONE)
    assert messages == [Message("all-reduce", ("tensor",), 64 // 8 * 6 * 4)]


def test_the_gradient_of_weights_is_added_up_over_the_batch():
    loss = lambda w, x: jnp.sum(x @ w)
    messages, (spec,) = said(jax.grad(loss), ((8, 6), (NONE, NONE)), ((64, 8), (BATCH, NONE)))
    assert spec == (NONE, NONE)
    (m,) = [m for m in messages if m.bytes > 4]
    assert (m.kind, set(m.axes), m.bytes, m.hidden) == ("all-reduce", set(BATCH), 8 * 6 * 4, True)


def test_one_axis_cannot_split_batch_and_weight():
    """Weights that are not fetched by name are gathered all the same."""
    messages, _ = said(jnp.matmul, ((64, 8), (BATCH, NONE)), ((8, 6), (("fsdp",), NONE)))
    assert messages == [Message("all-gather", ("fsdp",), 8 * 6 * 4)]


def test_constraints_gather_exchange_or_cut():
    constrain = lambda spec: (
        lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(MESH, spec))
    )
    split = ((64, 8), (("fsdp",), NONE))
    assert said(constrain(P()), split)[0] == [Message("all-gather", ("fsdp",), 64 * 8 * 4)]
    assert said(constrain(P(None, "fsdp")), split)[0] == [
        Message("all-to-all", ("fsdp",), 64 * 8 * 4 // 4)
    ]
    assert said(constrain(P("fsdp", "tensor")), split)[0] == []


def test_loops_say_it_every_turn():
    layers = lambda x, ws: jax.lax.scan(lambda h, w: (h @ w, None), x, ws)[0]
    weights = ((5, 8, 8), (NONE, ("tensor",), NONE))
    messages, (spec,) = said(layers, ((64, 8), (BATCH, NONE)), weights)
    assert messages == [Message("all-reduce", ("tensor",), 64 // 8 * 8 * 4, times=5)]
    assert spec == (BATCH, NONE)


def test_manual_regions_speak_for_themselves():
    body = lambda x: jax.lax.ppermute(x, "sequence", [(0, 1), (1, 0)])
    split = P("data", "sequence")
    f = jax.shard_map(body, mesh=MESH, in_specs=split, out_specs=split)
    messages, (spec,) = said(f, ((4, 8), (("data",), ("sequence",))))
    assert messages == [Message("collective-permute", ("sequence",), 4 * 8 * 4 // 4, hidden=True)]
    assert spec == (("data",), ("sequence",))


def test_noise_lies_as_what_it_is_added_to():
    def f(key, x):
        return jnp.sum(jax.random.normal(key, x.shape) + x)

    shapes = jax.random.key(0), jax.ShapeDtypeStruct((64, 8), jnp.float32)
    program = flatten(jax.make_jaxpr(f)(*shapes))
    spread(program, [(), (BATCH, NONE)], SIZES)
    bits = next(op.outputs[0] for op in program.ops if op.name == "random_bits")
    assert program.values[bits].spec == (BATCH, NONE)


@pytest.mark.parametrize(
    ("shape", "spec", "to", "after"),
    [
        ((8, 16, 4), (BATCH, NONE, NONE), (128, 4), (BATCH, NONE)),
        ((128, 4), (BATCH, NONE), (8, 16, 4), (BATCH, NONE, NONE)),
        ((8, 16, 12), (BATCH, NONE, ("tensor",)), (8, 16, 2, 6), (BATCH, NONE, ("tensor",), NONE)),
        ((8, 12), (BATCH, ("tensor",)), (8, 3, 4), (BATCH, NONE, NONE)),  # 3 does not divide
        ((8, 1, 16), (BATCH, NONE, ("sequence",)), (8, 16), (BATCH, ("sequence",))),
        ((8, 4, 4), (BATCH, ("sequence",), NONE), (8, 16), (BATCH, ("sequence",))),
    ],
)  # fmt: skip
def test_reshapes_keep_the_outermost_split(shape, spec, to, after):
    assert regroup(shape, spec, to, SIZES) == after


@pytest.mark.parametrize(
    "kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
)
def test_bytes_sent_are_counted_as_of_compiled_programs(kind):
    compiled = Collective(kind, (("f32", (100,)),), (tuple(range(8)),))
    assert Message(kind, BATCH, 400).sent(SIZES) == pytest.approx(compiled.sent)
