"""Data parallel and FSDP train what one device trains, and send nothing but what they must.

Everything is measured once, on 8 simulated devices, and asserted test by test.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import types

import jax
import numpy as np
import optax
import pytest
from simulated import simulated

from jdiff import losses, models, parallel, schedules
from jdiff.denoisers import network
from jdiff.parallel.collectives import collectives
from jdiff.parallel.layout import CONVOLUTIONAL, layout, within
from jdiff.parallel.shardings import SMALL, of_state
from jdiff.predictions import parameterization
from jdiff.training import ema
from jdiff.training import step as steps

BATCH, STEPS = 16, 10
RNG = np.random.default_rng(0)
X0 = RNG.standard_normal((BATCH, 8, 8, 2)).astype(np.float32)
COND = {
    "label": np.arange(BATCH, dtype=np.int32) % 4,
    "text": RNG.standard_normal((BATCH, 5, 24)).astype(np.float32),
    "pooled": RNG.standard_normal((BATCH, 24)).astype(np.float32),
}
TRANSFORMER = {"in_channels": 2, "width": 64, "depth": 2, "heads": 4}
NETS = {
    "dit": (models.DiT, TRANSFORMER | {"num_classes": 4, "scan": True}),
    "mmdit": (models.MMDiT, TRANSFORMER | {"text_width": 24, "pooled_width": 24,
                                           "image_size": 8, "positions": 4}),
    "unet": (models.UNet, {"image_size": 8, "in_channels": 2, "channels": 32, "blocks": 1,
                           "multipliers": (1,), "attention_sizes": (8,), "num_classes": 4}),
    "edm2": (models.EDM2, {"image_size": 8, "in_channels": 2, "channels": 32, "blocks": 1,
                           "multipliers": (1,), "attention_sizes": (8,), "head_channels": 16,
                           "num_classes": 4}),
    "cond_unet": (models.CondUNet, {"in_channels": 2, "widths": (32,), "blocks": 1,
                                    "depths": (1,), "heads": (2,), "text_width": 24,
                                    "groups": 8}),
}  # fmt: skip
ONE, DATA, FSDP, MIXED = {"data": 1}, {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}
#: net -> (optimiser, meshes besides that of one device).
CASES = {
    "dit": ("adam", (DATA, FSDP, MIXED)),
    "mmdit": ("adamw", (MIXED,)),
    "unet": ("adam", (DATA, FSDP)),
    "edm2": ("adam", (MIXED,)),
    "cond_unet": ("lion", (MIXED,)),
}
PAIRS = [
    pytest.param(net, mesh, id=f"{net}-{'-'.join(f'{a}{n}' for a, n in mesh.items())}")
    for net, (_, meshes) in CASES.items() for mesh in meshes
]  # fmt: skip
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3), "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-4)
}  # fmt: skip
DRAWN_SPLIT = ("dit", "edm2")
AVERAGES = {"slow": ema.constant(0.99), "fast": ema.power(0.1)}


def setup(net, mesh):
    """(start, step, batch) on the first devices, as many as the mesh has."""
    cls, fields = NETS[net]
    build = lambda rngs: cls(**fields, rngs=rngs)
    devices = jax.devices()[: math.prod(mesh.values())]
    laid = layout(parallel.make(mesh, devices), getattr(cls, "rules", CONVOLUTIONAL))
    apply = models.abstract(build)[0].with_layout(laid)
    tx = OPTIMIZERS[CASES[net][0]]()
    tx = cls.constrained(tx) if hasattr(cls, "constrained") else tx
    schedule, row = schedules.rectified_flow(), parameterization("velocity", time="t1000")

    def loss(params, key, batch, state):
        denoise = network(apply, params, schedule, row)
        return losses.denoising(key, denoise, batch["x0"], batch["cond"])

    def start(key):
        with within(laid):
            return steps.start(models.init(build, key)[1], key, tx, AVERAGES)

    key = jax.random.key(3)  # of this state alone: the first step takes its buffer
    placed = of_state(jax.eval_shape(start, key), models.axes(build), laid)
    step = steps.compile_step(steps.make_step(loss, tx, AVERAGES), placed, laid)
    # A program to draw the weights in is as large as a step: only where it is tested.
    split = net in DRAWN_SPLIT and mesh in (FSDP, MIXED)
    begin = jax.jit(start, out_shardings=placed) if split else start
    return jax.device_put(begin(key), placed), step, laid.put({"x0": X0, "cond": COND}, BATCH)


def train(net, mesh):
    """What is kept of some steps. `held`: leaf -> (elements, of them on each device)."""
    state, step, batch = setup(net, mesh)
    on_host = functools.partial(jax.tree.map, np.asarray)
    start = on_host(state.params)
    compiled = step.lower(state, batch).compile()
    found = []
    for _ in range(STEPS):
        state, values = compiled(state, batch)
        found.append(float(values["loss"]))
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.replace(state, key=None))
    return types.SimpleNamespace(
        losses=found, start=start, params=on_host(state.params), averages=on_host(state.averages),
        held={jax.tree_util.keystr(path): (a.size, math.prod(a.sharding.shard_shape(a.shape)))
              for path, a in leaves},
        collectives=collectives(compiled.as_text()),
        arguments=compiled.memory_analysis().argument_size_in_bytes,
    )  # fmt: skip


def measure():
    """(net, sizes of the mesh) -> what was found there."""
    return {
        (net, tuple(mesh.values()), tuple(mesh)): train(net, mesh)
        for net, (_, meshes) in CASES.items()
        for mesh in (ONE, *meshes)
    }


@pytest.fixture(scope="module")
def measured():
    return simulated(8, measure, timeout=1800)


@pytest.fixture
def trained(measured):
    found, _ = measured
    return lambda net, mesh: found[net, tuple(mesh.values()), tuple(mesh)]


def assert_close(a, b, atol):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def of_kind(trained, kind):
    return [c for c in trained.collectives if c.kind == kind]


def moved(found):
    """Bytes that come out of collectives in a step, those in loops as often as they run."""
    return sum(c.bytes * c.trips for c in found)


def bytes_of(params):
    return sum(4 * a.size for a in jax.tree.leaves(params))


@pytest.mark.parametrize(("net", "mesh"), PAIRS)
def test_ten_steps_are_those_of_one_device(trained, net, mesh):
    one, many = trained(net, ONE), trained(net, mesh)
    np.testing.assert_allclose(many.losses, one.losses, rtol=0, atol=1e-5)
    assert_close(many.params, one.params, 1e-5)
    assert_close(many.averages, one.averages, 1e-5)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, one.start)
    assert max(jax.tree.leaves(change)) > 5e-4


@pytest.mark.parametrize(("net", "mesh"), PAIRS)
def test_the_first_weights_are_those_of_one_device(trained, net, mesh):
    """Drawn on the host, or by the program that leaves each device its part."""
    assert_close(trained(net, mesh).start, trained(net, ONE).start, 1e-7)


@pytest.mark.parametrize(("net", "mesh"), PAIRS)
def test_the_state_stays_where_it_was_put(trained, net, mesh):
    """Weights, moments and averages in as many parts as fsdp has; what is small whole."""
    parts = mesh.get("fsdp", 1)
    held = trained(net, mesh).held
    assert all(size in (own, own * parts) for size, own in held.values())
    total = sum(size for size, _ in held.values())
    whole = sum(own for size, own in held.values() if own == size)
    assert all(own < size for size, own in held.values() if parts > 1 and size >= 2 * SMALL)
    share = 1 / parts + (0 if parts == 1 else whole / total)
    assert trained(net, mesh).arguments < 1.02 * share * trained(net, ONE).arguments


@pytest.mark.parametrize("net", ["dit", "unet"])
def test_data_parallel_sums_gradients_and_sends_nothing_else(trained, net):
    """One number a parameter, the loss, and what the norm of the gradient may add."""
    found = trained(net, DATA)
    assert {c.kind for c in found.collectives} == {"all-reduce"}
    gradient = bytes_of(found.params)
    assert gradient <= moved(found.collectives) <= gradient + 256
    assert all(c.groups == (tuple(range(8)),) for c in found.collectives)


SPLIT = [pair for pair in PAIRS if "fsdp" in pair.values[1]]


@pytest.mark.parametrize(("net", "mesh"), SPLIT)
def test_fsdp_gathers_weights_and_no_activation(trained, net, mesh):
    """Each array that is gathered is a split weight; each at most for the forward and the backward.

    So neither are activations sent, nor is more of the state gathered than one weight at a time.
    """
    found = trained(net, mesh)
    shape = lambda a: tuple(sorted(n for n in a if n > 1))
    stacked = {"blocks"} if net == "dit" else set()
    weights = {
        shape(a.shape[1:] if path[0].key in stacked else a.shape)
        for path, a in jax.tree_util.tree_leaves_with_path(found.params)
    }
    gathers = of_kind(found, "all-gather")
    assert gathers
    for c in gathers:
        assert {shape(a) for _, a in c.arrays} <= weights, c
        assert c.size == mesh["fsdp"]
        assert c.source.endswith("sharding_constraint"), c
    gradient = bytes_of(found.params)
    assert 0.8 * gradient < moved(gathers) < 2 * gradient


@pytest.mark.parametrize(("net", "mesh"), SPLIT)
def test_fsdp_sums_gradients_and_sends_nothing_else(trained, net, mesh):
    """Reduce-scatter where a backend has it; XLA's CPU one sums and cuts."""
    found = trained(net, mesh)
    kinds = {c.kind for c in found.collectives}
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
    sums = [c for c in found.collectives if c.kind != "all-gather"]
    gradient = bytes_of(found.params)
    assert 0.9 * gradient < moved(sums) < 1.3 * gradient + 4096


def test_nothing_is_laid_out_anew_by_force(measured):
    """XLA prints it when it copies an array whole to get from one sharding to another."""
    _, output = measured
    assert "rematerialization" not in output


def test_a_step_compiles_once():
    """Whatever the fast path of jit counts: the state comes back as it was given."""
    laid = layout(parallel.make({"fsdp": 4}))
    tx = optax.adam(1e-3)
    params = {"w": np.ones((64, 64), np.float32), "b": np.zeros(64, np.float32)}
    start = lambda: steps.start(params, jax.random.key(0), tx, AVERAGES)
    placed = of_state(jax.eval_shape(start), {"w": ("embed", None), "b": ("embed",)}, laid)
    loss = lambda p, key, batch, state: ((batch["x"] @ p["w"] + p["b"]) ** 2).mean(-1)
    step = steps.compile_step(steps.make_step(loss, tx, AVERAGES), placed, laid)
    state, batch = jax.device_put(start(), placed), laid.put({"x": np.ones((8, 64), "f")}, 8)
    with jax.log_compiles(), mentions("Finished XLA compilation of jit(step)") as compiled:
        for _ in range(4):
            state, _ = step(state, batch)
    assert len(compiled) == 1
    same = jax.tree.map(lambda a, where: a.sharding.is_equivalent_to(where, a.ndim), state, placed)
    assert all(jax.tree.leaves(same))


@contextlib.contextmanager
def mentions(text):
    """The lines that jax logs meanwhile and that hold `text`."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record) if text in record.getMessage() else None
    logging.getLogger("jax").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("jax").removeHandler(handler)
