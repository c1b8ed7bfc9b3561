"""What all text networks have in common: inputs that are refused, layers, precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models, parallel
from jdiff.errors import UserError
from jdiff.parallel.layout import layout
from jdiff.texts import base
from jdiff.texts.bert import Bert
from jdiff.texts.clip import ClipText
from jdiff.texts.t5 import T5Encoder

SMALL = {"vocab": 20, "width": 8, "depth": 2, "heads": 2, "hidden": 12}
NETWORKS = {
    "clip": functools.partial(ClipText, **SMALL, length=6, projection=4),
    "t5": functools.partial(T5Encoder, **SMALL, head_width=3),
    "bert": functools.partial(Bert, **SMALL, length=6),
}
IDS, MASK = jnp.ones((2, 5), int), jnp.ones((2, 5), bool)


def shapes(name, **changes):
    return models.abstract(lambda rngs: NETWORKS[name](**changes, rngs=rngs))


def drawn(empty):
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), empty)


def operations(jaxpr):
    """Of a program and the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_softmax_and_norms_are_float32_whatever_the_activations(name, dtype):
    """Products are of that dtype; what is exponentiated, and what norms divide by, never is."""
    apply, params = shapes(name, dtype=dtype)
    read = functools.partial(apply.method("read"), layers=(0, -1))
    found = list(operations(jax.make_jaxpr(read)(params, IDS, MASK).jaxpr))
    kinds = lambda *names: {
        eqn.invars[0].aval.dtype.name for eqn in found if eqn.primitive.name in names
    }
    assert kinds("exp", "rsqrt", "reduce_max") == {"float32"}
    assert dtype in kinds("dot_general")
    out = jax.eval_shape(read, params, IDS, MASK)
    assert {a.dtype.name for a in jax.tree.leaves(out)} == {"float32"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_attributes_say_what_it_reads(name):
    apply, params = shapes(name)
    network, out = apply.skeleton(), jax.eval_shape(apply.method("read"), params, IDS, MASK)
    assert (network.vocab, network.depth) == (20, 2)
    assert network.length == (None if name == "t5" else 6)
    assert out.last.shape == (*IDS.shape, network.width) and out.hidden == ()
    assert {"clip": (2, 4), "t5": None, "bert": (2, 8)}[name] == getattr(out.pooled, "shape", None)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (jnp.ones((2, 7), int), None, "ClipText has positions for 6 tokens a text, not 7"),
        (jnp.ones((2, 5)), None, r"reads ids as integers \[B, S\], not float32 \[2, 5\]"),
        (jnp.ones(5, int), None, r"not int32 \[5\]"),
        (IDS, jnp.ones((2, 5)), r"the mask as bool \[B, S\] = \[2, 5\], not float32 \[2, 5\]"),
        (IDS, jnp.ones((1, 5), bool), r"not bool \[1, 5\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(ids, mask, message):
    apply, params = shapes("clip")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(apply.method("read"), params, ids, mask)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(layer):
    apply, params = shapes("bert")
    with pytest.raises(UserError, match=f"layers: {layer} given, allowed -3 to 2"):
        jax.eval_shape(functools.partial(apply.method("read"), layers=(layer,)), params, IDS)


@pytest.mark.parametrize("name", NETWORKS)
def test_fields_out_of_range_are_refused(name):
    for field, value in {"depth": 0, "vocab": 0, "hidden": -1}.items():
        with pytest.raises(ValueError, match=f"{field}={value} must be positive"):
            shapes(name, **{field: value})
    with pytest.raises(UserError, match="activation 'gelu_tanh' is not known"):
        shapes(name, activation="gelu_tanh")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_causal_network_does_not_look_ahead_and_the_others_do(name):
    """Two texts that differ in their last token: the states before it differ but in CLIP."""
    apply, empty = shapes(name, scan=True)
    last = jax.jit(apply.method("read"))(drawn(empty), IDS.at[1, -1].set(3)).last
    assert np.array_equal(last[0, :-1], last[1, :-1]) == (name == "clip")
    assert not np.array_equal(last[0, -1], last[1, -1])


def test_a_t5_split_over_devices_reads_the_same():
    """By heads and hidden units, and its weights apart: the one that no small device holds."""
    apply, empty = shapes("t5", scan=True)
    axes = models.axes(lambda rngs: NETWORKS["t5"](scan=True, rngs=rngs))
    over = layout(parallel.make({"fsdp": 2, "tensor": 2}, jax.devices()[:4]), T5Encoder.rules)
    params, ids = drawn(empty), jnp.arange(20).reshape(4, 5)
    seen = ids % 5 <= ids[:, :1] // 5  # one token of the first, two of the second
    where = jax.tree.map(lambda leaf, names: over.sharding(names, leaf.shape), empty, axes)
    split = jax.device_put(params, where)
    assert split["blocks"]["q"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    one = jax.jit(apply.method("read"))(params, ids, seen).last
    two = jax.jit(apply.with_layout(over).method("read"))(split, ids, seen).last
    np.testing.assert_allclose(two, one, atol=1e-5)


def test_activations_by_name_are_their_definitions():
    """Of the normal distribution function, and of what is published for it."""
    x = np.linspace(-4, 4, 41)
    phi = 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    tanh = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    wanted = {"gelu": x * phi, "gelu_new": x * tanh, "quick_gelu": x / (1 + np.exp(-1.702 * x))}
    for name, value in wanted.items():
        np.testing.assert_allclose(base.ACTIVATIONS[name](jnp.asarray(x)), value, atol=1e-6)
