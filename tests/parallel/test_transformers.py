"""Transformers split over tensor and sequence are those of one device, and send what they must.

Everything is measured once, on 8 simulated devices, and asserted test by test.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from simulated import simulated

from jdiff import losses, models, parallel, schedules
from jdiff.denoisers import network
from jdiff.parallel.all_to_all import all_to_all
from jdiff.parallel.collectives import collectives
from jdiff.parallel.layout import TRANSFORMER, layout
from jdiff.parallel.ring import ring
from jdiff.parallel.shardings import of_state
from jdiff.predictions import parameterization
from jdiff.training import ema
from jdiff.training import step as steps

BATCH, STEPS, WIDTH, TOKENS, TEXT = 8, 10, 64, 16, 5
RNG = np.random.default_rng(0)
X0 = RNG.standard_normal((BATCH, 8, 8, 4)).astype(np.float32)
T = np.linspace(0.1, 0.9, BATCH, dtype=np.float32)
# 5 tokens of text, of which some samples have fewer: they do not divide over any axis.
COND = {
    "label": np.arange(BATCH, dtype=np.int32) % 4,
    "text": RNG.standard_normal((BATCH, TEXT, 24)).astype(np.float32),
    "text_mask": np.arange(TEXT) <= np.arange(BATCH)[:, None] % TEXT,
    "pooled": RNG.standard_normal((BATCH, 24)).astype(np.float32),
}
SIZE = {"in_channels": 4, "width": WIDTH, "heads": 4}
JOINT = SIZE | {"text_width": 24, "pooled_width": 24}
NETS = {
    "dit": (models.DiT, SIZE | {"depth": 2, "num_classes": 4, "scan": True}),
    "mmdit": (models.MMDiT, JOINT | {"depth": 3, "image_size": 8, "positions": 4, "scan": True,
                                     "qk_norm": True}),
    "flux": (models.Flux, JOINT | {"depth": 1, "single_depth": 1, "rope_dims": (4, 6, 6)}),
    "qwen": (models.QwenImage, SIZE | {"depth": 1, "text_width": 24, "rope_dims": (4, 6, 6)}),
    "z_image": (models.ZImage, SIZE | {"depth": 1, "refiners": 0, "text_width": 24,
                                       "rope_dims": (4, 6, 6), "positions": (64, 8, 8)}),
    "pixart": (models.PixArt, SIZE | {"depth": 1, "text_width": 24, "image_size": 8}),
    "uvit": (models.UViT, SIZE | {"depth": 3, "image_size": 8, "num_classes": 4}),
    "jit": (models.JiT, SIZE | {"depth": 2, "patch": 2, "num_classes": 4, "context": 3,
                                "context_start": 1, "bottleneck": 16}),
}  # fmt: skip
ONE = {"data": 1}
TENSOR = {"data": 4, "tensor": 2}
SEQUENCE = {"data": 2, "sequence": 4}
ALL = {"fsdp": 2, "tensor": 2, "sequence": 2}
EXCHANGE = ALL | {"attention": "all_to_all"}
TRAINED = {"dit": (ONE, TENSOR, SEQUENCE, EXCHANGE), "mmdit": (ONE, TENSOR, SEQUENCE, ALL)}
OPTIMIZERS = {
    "dit": (optax.adam(3e-3, eps=1e-4), {"ema": ema.constant(0.99)}),
    "mmdit": (optax.sgd(0.05), {}),  # less to compile
}
OTHERS = tuple(name for name in NETS if name not in TRAINED)


def setup(net, attention="ring", **mesh):
    """(apply, random weights where they belong, their shardings, layout) on the first devices."""
    cls, fields = NETS[net]
    build = lambda rngs: cls(**fields, rngs=rngs)
    over = layout(parallel.make(mesh, jax.devices()[: math.prod(mesh.values())]), TRANSFORMER)
    apply, shapes = models.abstract(build)
    apply = apply.with_layout(over)
    if mesh.get("sequence", 1) > 1:
        kernel = ring(over) if attention == "ring" else all_to_all(over)
        apply = apply.with_attention(kernel, "attention")
    random = np.random.default_rng(1)  # not those of `init`, whose gates are shut
    params = jax.tree.map(lambda s: 0.1 * random.standard_normal(s.shape, np.float32), shapes)
    axes = models.axes(build)
    return apply, jax.device_put(params, of_state(shapes, axes, over)), axes, over


def train(net, mesh):
    """(losses, weights, collectives of the step) of a few steps."""
    apply, params, axes, over = setup(net, **mesh)
    # Adam's eps: some gradients are 0 but for rounding (those of the keys' biases).
    tx, averages = OPTIMIZERS[net]
    schedule, row = schedules.rectified_flow(), parameterization("velocity", time="t1000")

    def loss(params, key, batch, state):
        denoise = network(apply, params, schedule, row)
        return losses.denoising(key, denoise, batch["x0"], batch["cond"])

    start = lambda params: steps.start(params, jax.random.key(3), tx, averages)
    placed = of_state(jax.eval_shape(start, params), axes, over)
    state = jax.jit(start, out_shardings=placed)(params)
    step = steps.compile_step(steps.make_step(loss, tx, averages), placed, over)
    batch = over.put({"x0": X0, "cond": COND}, BATCH)
    compiled = step.lower(state, batch).compile()
    values = []
    for _ in range(STEPS):
        state, more = compiled(state, batch)
        values.append(float(more["loss"]))
    found = collectives(compiled.as_text())
    return values, jax.tree.map(np.asarray, (state.params, state.averages)), found


def gradient(net, mesh):
    """(output, gradient of the mean of its square) of one call, both on the host."""
    apply, params, _, over = setup(net, **mesh)
    batch = over.put((X0, T, COND), BATCH)

    @jax.jit
    def run(params, x, t, cond):
        def loss(params):
            y = apply(params, x, t, cond)
            return jnp.square(y).mean(), y

        return jax.grad(loss, has_aux=True)(params)

    grads, y = jax.tree.map(np.asarray, run(params, *batch))
    return y, grads


def name(mesh):
    return tuple(mesh.items())


def measure():
    trained = {(net, name(mesh)): train(net, mesh) for net in TRAINED for mesh in TRAINED[net]}
    called = {(net, name(mesh)): gradient(net, mesh) for net in OTHERS for mesh in (ONE, ALL)}
    return trained, called


@functools.cache
def measured():
    return simulated(8, measure, timeout=1500)[0]


PARALLEL = [(net, mesh) for net in TRAINED for mesh in TRAINED[net][1:]]
NAMES = [f"{net}-{'-'.join(map(str, mesh.values()))}" for net, mesh in PARALLEL]


@pytest.mark.parametrize(("net", "mesh"), PARALLEL, ids=NAMES)
def test_ten_steps_are_those_of_one_device(net, mesh):
    trained, _ = measured()
    values, weights, _ = trained[net, name(ONE)]
    found, others, _ = trained[net, name(mesh)]
    assert values[-1] < 0.9 * values[0]
    np.testing.assert_allclose(found, values, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(others)):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("net", OTHERS)
def test_every_family_and_its_gradient_are_those_of_one_device(net):
    _, called = measured()
    y, grads = called[net, name(ONE)]
    found, others = called[net, name(ALL)]
    np.testing.assert_allclose(found, y, atol=1e-5 * np.abs(y).max())
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others)):
        np.testing.assert_allclose(b, a, atol=1e-5 * scale)


def of_activations(found, rows, *lengths):
    """The arrays of `found` that are tokens on a device, as (kind, whether it is in a loop)."""
    shapes = {(rows, n, *rest) for n in lengths for rest in ((WIDTH,), (4, WIDTH))}
    return sorted((c.kind, c.loops > 0) for c in found for _, shape in c.arrays if shape in shapes)


def test_a_tensor_parallel_block_sums_twice_each_way_and_sends_nothing_else():
    trained, _ = measured()
    *_, found = trained["dit", name(TENSOR)]
    over_tensor = [c for c in found if c.size == 2]
    assert all(c.kind == "all-reduce" for c in over_tensor)
    sums = [shape for c in over_tensor if c.loops for _, shape in c.arrays]
    assert sums == [(BATCH // 4, 4, 4, WIDTH)] * 4
    assert {c.kind for c in found} == {"all-reduce"}  # the others are of gradients, over data


def test_a_joint_block_sums_twice_each_way_a_stream():
    trained, _ = measured()
    *_, found = trained["mmdit", name(TENSOR)]
    over_tensor = [c for c in found if c.size == 2]
    shapes = [shape for c in over_tensor if c.loops for _, shape in c.arrays]
    image, text = (BATCH // 4, TOKENS, WIDTH), (BATCH // 4, TEXT, WIDTH)
    tokens = [shape for shape in shapes if math.prod(shape) >= math.prod(text)]
    assert sorted(tokens) == sorted([image] * 4 + [text] * 4)
    # Besides the scales of the norms of queries and keys, which all heads share.
    assert {math.prod(shape) for shape in shapes} <= {math.prod(image), math.prod(text), WIDTH // 4}
    assert {c.kind for c in found} == {"all-reduce"}


@pytest.mark.parametrize(("net", "length"), [("dit", 16), ("mmdit", 16 + 8)])
def test_split_tokens_go_round_and_are_gathered_once_as_the_image(net, length):
    """No activation but k and v (and their gradients) is sent to other devices of the sequence."""
    trained, _ = measured()
    *_, found = trained[net, name(SEQUENCE)]
    sent = [c for c in found if c.kind == "collective-permute"]
    part = (BATCH // 2, 4, length // 4, WIDTH // 4)
    assert {shape for c in sent for _, shape in c.arrays} == {part}
    in_blocks = [c for c in sent if c.trips % 2 == 0]  # 2 scanned blocks; MM-DiT's last is apart
    assert sum(c.trips for c in in_blocks) == 2 * (2 * 3 + 2 * 3 + 2 * 4)
    gathered = [c for c in found if c.kind == "all-gather"]
    assert [c.bytes for c in gathered] == [X0.nbytes // 2]
    assert {c.kind for c in found} == {"all-reduce", "all-gather", "collective-permute"}
    sums = {shape for c in found if c.kind == "all-reduce" for _, shape in c.arrays}
    assert not any(len(shape) > 2 and shape[0] == BATCH // 2 for shape in sums)  # of no tokens


def test_exchanged_heads_are_all_that_all_to_all_attention_sends():
    trained, _ = measured()
    *_, found = trained["dit", name(EXCHANGE)]
    exchanged = [shape for c in found if c.kind == "all-to-all" for _, shape in c.arrays]
    assert len(exchanged) == 2 * (4 + 4)  # slices for 2 devices; q, k, v and out each way
    assert "collective-permute" not in {c.kind for c in found}
    sums = [
        shape for c in found if c.kind == "all-reduce" for _, shape in c.arrays if len(shape) == 4
    ]
    assert sums == [(BATCH // 2, 2, 4, WIDTH)] * 4
