"""The plan of a training step: what it keeps, computes and sends on each device, and how long."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from jdiff.models import count
from jdiff.models.flops import step_flops
from jdiff.planning import cpu, memory, roofline, trace
from jdiff.planning.chips import Devices
from jdiff.planning.spread import Message
from jdiff.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      params, optimizer, averages, frozen: of the training state; step number and key with params.
      batch: of its part of a batch.
      gradients, activations: of the most that lives at once beside them. Gradients are as large as
        parameters; all else is activations, and what is fetched from other devices.
    """

    params: int
    optimizer: int
    averages: int
    frozen: int
    batch: int
    gradients: int
    activations: int

    @property
    def state(self) -> int:
        """What a checkpoint of this device would hold."""
        return self.params + self.optimizer + self.averages + self.frozen

    @property
    def total(self) -> int:
        """All together: what must fit."""
        return self.state + self.batch + self.gradients + self.activations


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step, at best.

    Attributes:
      products: that the peak of products bounds.
      bandwidth: that memory's bandwidth bounds.
      hidden: of messages that computation can go on beside.
      waited: of messages that it waits for.
    """

    products: float
    bandwidth: float
    hidden: float
    waited: float

    @property
    def step(self) -> float:
        """The longer of computing and what goes on beside it, and what is waited for."""
        return max(self.products + self.bandwidth, self.hidden) + self.waited

    @property
    def bound(self) -> str:
        """What bounds the step: "compute", "memory" or "communication"."""
        computing = self.products + self.bandwidth
        if self.hidden > computing or self.waited > computing:
            return "communication"
        return "compute" if self.products >= self.bandwidth else "memory"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a config does on these devices.

    Attributes:
      mesh: size of each axis.
      parameters: of the network.
      memory: of one device.
      flops: operations of a step on all devices, as MFU counts them (nothing twice).
      work: what one device does.
      messages: what the devices say to each other.
      time: None where the chip's rates are not known.
    """

    devices: Devices
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    memory: Memory
    flops: int
    work: roofline.Work
    messages: list[Message]
    time: Time | None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, of the bfloat16 peak, at that time."""
        if self.time is None:
            return None
        return self.flops / (self.time.step * self.devices.chip.peak * self.devices.count)

    @property
    def capacity(self) -> float | None:
        """Bytes of a device that jax takes."""
        chip = self.devices.chip
        return None if chip.memory is None else chip.memory * chip.usable

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the device's memory is not known."""
        return None if self.capacity is None else self.memory.total <= self.capacity


def plan(config: Any, info: Any, devices: Devices) -> Plan:
    """Plans the step of `config` on data that `info` describes; computes nothing.

    Raises:
      UserError: a mesh that does not make these devices, or what training would refuse too.
    """
    return of_traced(trace.trace(config, info, devices.count), devices)


def of_traced(traced: trace.Traced, devices: Devices) -> Plan:
    """The plan of a step that was traced for as many devices."""
    work = roofline.work(traced.program, traced.size, traced.mesh, devices)
    hidden, waited = (
        roofline.seconds([m for m in traced.messages if m.hidden is h], traced.mesh, devices)
        for h in (True, False)
    )
    known = None not in (work.products, work.rest, hidden, waited)
    return Plan(
        devices=devices,
        mesh=traced.mesh,
        batch_size=jax.tree.leaves(traced.batch)[0].shape[0],
        parameters=count(traced.state.params),
        memory=memory_of(traced, devices),
        flops=step_flops(traced.jaxpr),
        work=work,
        messages=traced.messages,
        time=Time(work.products, work.rest, hidden, waited) if known else None,
    )


def memory_of(traced: trace.Traced, devices: Devices) -> Memory:
    """Where one device's memory goes."""
    state, placed, program = traced.state, traced.placed, traced.program
    of = lambda part: _on_device(getattr(state, part), getattr(placed, part))
    arguments = sum(traced.size(program, v) for v in program.inputs)
    params, optimizer, averages, frozen = map(of, ("params", "opt", "averages", "frozen"))
    small = _on_device((state.step, state.key, state.bad_step), None)
    program = cpu.written_out(program) if devices.chip.name == "cpu" else program
    use = memory.measure(program, traced.size, donated=True)
    like = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    held = [v for v in use.held if program.values[v].shape in like]
    gradients = sum(traced.size(program, v) for v in held)
    return Memory(
        params=params + small,
        optimizer=optimizer,
        averages=averages,
        frozen=frozen,
        batch=arguments - params - small - optimizer - averages - frozen,
        gradients=gradients,
        activations=use.peak - gradients,
    )


def by_kind(messages: Iterable[Message], mesh: dict[str, int]) -> dict[tuple, dict[str, float]]:
    """(kind, axes) -> {"count", "bytes" of results, "sent" by a device} of a step."""
    table: dict[tuple, dict[str, float]] = {}
    for m in messages:
        row = table.setdefault((m.kind, m.axes), {"count": 0, "bytes": 0, "sent": 0.0})
        row["count"] += m.times
        row["bytes"] += m.times * m.bytes
        row["sent"] += m.sent(mesh)
    return table


def _on_device(tree: PyTree, placed: PyTree) -> int:
    """Bytes of arrays on one device; of whole ones if `placed` is None."""
    leaves = jax.tree.leaves(tree)
    where = [None] * len(leaves) if placed is None else jax.tree.leaves(placed)
    total = 0
    for leaf, sharding in zip(leaves, where, strict=True):
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        wide = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += wide * math.prod(shape)
    return total
