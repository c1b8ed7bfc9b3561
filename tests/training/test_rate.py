"""Speed and utilisation: what a step computes is counted in the program that trains."""

import jax
import pytest

from jdiff import experiment, models
from jdiff.data.sources import Info
from jdiff.models.flops import PEAKS, flops, training_flops
from jdiff.training import rate
from jdiff.training import step as steps

DIT = {"name": "dit", "width": 16, "depth": 2, "heads": 2}
UNET = {"name": "unet", "channels": 8, "multipliers": (1,), "blocks": 1}
MEANFLOW = {
    "model": DIT | {"scalars": ("t-s",)}, "loss": {"name": "meanflow"},
    "schedule": {"name": "rectified_flow"}, "parameterization": {"target": "velocity", "time": "t"},
}  # fmt: skip


def traced(sections):
    """(the experiment, the arguments of its step, the step as jit has traced it)."""
    c = experiment.defaults()
    c.train.batch_size = 8
    for section, entries in ({"model": DIT} | sections).items():
        c[section].update(entries)
    layout = experiment.layout(c) if "mesh" in sections else None
    exp = experiment.build(c, Info("x", "train", (8, 8, 1), 10, (), 100), None, layout)
    _, params = models.abstract(exp.build)
    start = lambda params, key: steps.start(params, key, exp.optimizer, exp.averages)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(start, params, key)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 8, 8, 1), "uint8"),
        "label": jax.ShapeDtypeStruct((8,), "int32"),
    }
    step = steps.make_step(exp.loss, exp.optimizer, exp.averages, c.train.accumulate)
    placed = exp.placed(state) if layout else None
    compiled = steps.compile_step(step, placed, layout)
    return exp, (params, key, batch, state), compiled.trace(state, batch)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": DIT | {"remat": True}},  # what is computed again does not count
        {"model": DIT | {"scan": True, "remat": True}},
        {"model": UNET},
        {"optimizer": {"name": "muon"}},  # nor do the products of an optimiser
        {"train": {"accumulate": 4}},
        {"loss": {"name": "consistency"}},  # two calls of the network, of which one has a gradient
        MEANFLOW,  # a jvp and its gradient
    ],
    ids=["dit", "remat", "scan", "unet", "muon", "accumulate", "consistency", "meanflow"],
)
def test_the_step_counts_as_the_gradient_of_its_loss(sections):
    exp, (params, key, batch, state), step = traced(sections)
    counted, _ = rate.flops(step)
    assert counted == training_flops(exp.loss, params, key, batch, state)


def test_all_devices_together_compute_what_one_would():
    split = {"mesh": {"sequence": 2, "data": 2, "attention": "all_to_all"}}
    counts = [
        rate.flops(traced({"model": DIT, **sections})[2])[0]
        for sections in ({}, split, {"mesh": {"fsdp": 4, "data": 1}})
    ]
    assert len(set(counts)) == 1 and counts[0]


def test_about_three_times_the_network():
    exp, (params, _, batch, _), step = traced({})
    x = jax.ShapeDtypeStruct((8, 8, 8, 1), "float32")
    t = jax.ShapeDtypeStruct((8,), "float32")
    once = flops(exp.apply, params, x, t, {"label": batch["label"]})
    assert 2.5 * once < rate.flops(step)[0] < 3 * once  # the first layer needs no gradient by x


def test_a_coupling_on_the_host_is_no_operation_of_the_device():
    plain, coupled = (
        rate.flops(traced({"loss": {"coupling": {"name": name}}})[2])[0]
        for name in ("independent", "ot")
    )
    assert coupled - plain == 2 * 8 * 8 * 64  # the distances of 8 images from 8 noises


def test_counting_does_not_trace_the_step_again():
    calls = []

    def step(state, batch):
        calls.append(state)
        return state @ batch, {}

    compiled = steps.compile_step(step)
    a = jax.numpy.ones((4, 4))
    rate.flops(compiled.trace(a, a))
    compiled(jax.numpy.copy(a), a)
    assert len(calls) == 1


def test_what_cannot_be_counted_has_a_reason():
    def loss(w):
        return jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, w).sum()

    step = jax.jit(lambda w: jax.jvp(loss, (w,), (w,)))
    counted, reason = rate.flops(step.trace(jax.ShapeDtypeStruct((2, 2), "float32")))
    assert counted is None
    assert "while loop" in reason


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100-PCIE-40GB", "a100"),
        ("TPU v4", "tpu-v4"), ("TPU v5 lite", "tpu-v5e"), ("TPU v5", "tpu-v5p"),
        ("TPU v5p", "tpu-v5p"), ("TPU v6 lite", "tpu-v6e"),
    ],
)  # fmt: skip
def test_devices_have_the_peak_of_their_data_sheet(kind, name):
    assert rate.peak(kind) == PEAKS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "TPU v4 lite", ""])
def test_of_other_devices_no_peak_is_claimed(kind):
    assert rate.peak(kind) is None


def test_speed_by_hand():
    # 100 images a second in steps of 20 are 5 steps a second of 2e9 operations: 1e10 of 4 x 1e10.
    known = rate.Speed(batch_size=20, devices=4, flops=int(2e9), peak=1e10)
    assert known.of(100.0) == pytest.approx(
        {"images_per_s": 100.0, "images_per_s_chip": 25.0, "mfu": 0.25}
    )
    assert known.of(0.0) == {"images_per_s": 0.0, "images_per_s_chip": 0.0}
    assert rate.Speed(20, 4).of(100.0).keys() == {"images_per_s", "images_per_s_chip"}
