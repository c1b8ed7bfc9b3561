"""The plan against XLA on CPU: memory within 15 %, collectives to the byte."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from simulated import simulated

from jdiff import experiment, models
from jdiff.data.sources import Info
from jdiff.parallel import collectives, layout, mesh, of_state
from jdiff.planning import chips, trace
from jdiff.planning.plan import Plan, by_kind, of_traced
from jdiff.training import ema
from jdiff.training import step as steps

WITHIN = 0.15
INFO = Info("test", "train", (16, 16, 4), 10, (), 0)


def config(model, batch=64, **sizes):
    c = experiment.defaults()
    c.model.update(model)
    c.train.batch_size = batch
    c.optimizer.clip = 1.0
    c.ema = {"a": {"kind": "constant", "decay": 0.99}, "b": {"kind": "power", "sigma_rel": 0.1}}
    c.mesh.update(sizes)
    return c


DIT = {"name": "dit", "patch": 2, "width": 192, "depth": 2, "heads": 6}
UNET = {"name": "unet", "channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_sizes": ()}
CASES = {
    "dit": config(DIT),
    "scanned dit, all computed again": config(DIT | {"scan": True, "remat": True}),
    "unet": config(UNET, 32),
    "unet, all computed again": config(UNET | {"remat": True}, 32),
}
SPLIT = {
    "dit, fsdp x sequence": config(DIT | {"scan": True}, fsdp=4, sequence=2, attention="ring"),
    "dit, data x fsdp x tensor": config(DIT | {"scan": True}, fsdp=2, tensor=2),
    "unet, fsdp": config(UNET, 64, fsdp=8),
}


class Compiled(NamedTuple):
    arguments: int
    temporary: int
    said: dict  # kind -> bytes of results in a step

    @property
    def total(self):
        return self.arguments + self.temporary


def compiled(step, state, batch, placed, where) -> Compiled:
    """XLA's word on a step, its state donated."""
    done = steps.compile_step(step, placed, where).lower(state, batch).compile()
    memory, said = done.memory_analysis(), {}
    for c in collectives.collectives(done.as_text()):
        said[c.kind] = said.get(c.kind, 0) + c.bytes * c.trips
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, said)


def of_config(c, count) -> tuple[Plan, Compiled]:
    """A plan made without the devices, and the step compiled for them."""
    planned = of_traced(trace.trace(c, INFO, count), chips.devices(f"{count}xcpu"))
    real = mesh.make({a: c.mesh[a] for a in mesh.AXES}, jax.devices()[:count])
    exp, _ = trace.build(c, INFO, real)
    state, batch = trace.arguments(exp, INFO)
    return planned, compiled(trace.step(exp), state, batch, exp.placed(state), exp.layout)


def split():
    """In a process of eight devices; numbers alone come back."""
    found = {}
    for name, c in SPLIT.items():
        planned, xla = of_config(c, 8)
        table = by_kind(planned.messages, planned.mesh)
        found[name] = planned.memory, table, xla._asdict()
    return found


def agrees(planned, total):
    assert planned == pytest.approx(total, rel=WITHIN), f"{planned / total:.3f} of XLA's"


@pytest.mark.parametrize("name", CASES)
def test_memory_of_one_device(name):
    planned, xla = of_config(CASES[name], 1)
    assert planned.memory.state + planned.memory.batch == xla.arguments
    agrees(planned.memory.total, xla.total)
    assert planned.messages == [] and not xla.said


def test_memory_of_an_mmdit_in_a_loop_of_ones_own():
    """Two streams of tokens, text among the inputs: not of a config, `of_step` takes any step."""
    fields = {"in_channels": 4, "width": 128, "depth": 3, "heads": 4, "text_width": 64}
    fields |= {"pooled_width": 32, "image_size": 16, "positions": 16, "scan": True}
    build = lambda rngs: models.MMDiT(**fields, rngs=rngs)
    apply, params = models.abstract(build)
    where = layout.layout(mesh.make({}, jax.devices()[:1]))

    def loss(params, key, batch, state):
        eps = jax.random.normal(key, batch["x"].shape)
        t = jax.random.uniform(key, (len(eps), 1, 1, 1))
        cond = {"text": batch["text"], "pooled": batch["pooled"]}
        out = apply(params, (1 - t) * batch["x"] + t * eps, 1000 * t[:, 0, 0, 0], cond)
        return jnp.square(out - (eps - batch["x"])).mean((1, 2, 3))

    optimizer, averages = optax.adamw(1e-3), {"ema": ema.constant(0.99)}
    state = trace.abstract_state(params, optimizer, averages)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batch = {"x": shape((64, 16, 16, 4)), "text": shape((64, 20, 64)), "pooled": shape((64, 32))}
    placed = of_state(state, models.axes(build), where)
    step = steps.make_step(loss, optimizer, averages)
    planned = of_traced(trace.of_step(step, state, batch, placed, where), chips.devices("1xcpu"))
    xla = compiled(step, state, batch, placed, where)
    assert planned.memory.state + planned.memory.batch == xla.arguments
    agrees(planned.memory.total, xla.total)


def test_memory_and_collectives_of_eight_devices():
    found, _ = simulated(8, split)
    for name, (memory, table, xla) in found.items():
        xla = Compiled(**xla)
        assert memory.state + memory.batch == xla.arguments, name
        agrees(memory.total, xla.total)
        # Weights fetched, forward and backward, and nothing else gathered but crumbs.
        fetched = table["all-gather", ("fsdp",)]["bytes"]
        assert fetched == pytest.approx(xla.said["all-gather"], rel=0.02), name
        # XLA's CPU backend adds whole gradients up and cuts its part out; TPUs and GPUs scatter.
        if SPLIT[name].mesh.sequence > 1:  # gradients are summed in two turns there, in any order
            turned = table["collective-permute", ("sequence",)]["bytes"]
            # The same on jax 0.10; jax 0.11's programs turn a third more than was traced.
            assert turned <= xla.said["collective-permute"] <= 1.34 * turned
            continue
        summed = 0
        for (kind, axes), row in table.items():
            after = [a for (k, a) in table if k == "reduce-scatter"]
            if kind == "reduce-scatter":
                summed += row["bytes"] * {("fsdp",): SPLIT[name].mesh.fsdp}[axes]
            elif kind == "all-reduce" and not (axes == ("data",) and after):
                summed += row["bytes"]
        assert summed == pytest.approx(xla.said["all-reduce"], rel=0.02), name
        assert set(xla.said) <= {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
