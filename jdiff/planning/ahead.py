"""The compiler's own word on devices that are not here: the step compiled for an absent topology.

jax compiles for TPUs without one where libtpu is installed (`jax.experimental.topologies`). Nothing
runs. What comes back is the compiler's memory and its collectives, after all its optimisations.
"""

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

import jax

from jdiff.errors import UserError
from jdiff.models.flops import PEAKS
from jdiff.parallel import mesh as meshes
from jdiff.parallel.collectives import Collective, collectives
from jdiff.planning import trace
from jdiff.planning.chips import Devices
from jdiff.training import step as steps


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device.

    Attributes:
      arguments, temporary: bytes, of the state and batch, and of all else.
      peak: bytes, the most at once, as the compiler itself counts; 0 where it does not say.
      messages: the collectives of a step.
      seconds: that compiling took.
    """

    topology: str
    arguments: int
    temporary: int
    peak: int
    messages: list[Collective]
    seconds: float


def why_not(devices: Devices) -> str | None:
    """Why the compiler cannot be asked, in one line; None if it can."""
    name = devices.chip.name
    if f"tpu-{name}" not in PEAKS:
        return f"no compiler for an absent {name}; the figures are the analytic model's."
    if importlib.util.find_spec("libtpu") is None:
        return (
            "libtpu is not installed, so that TPU programs cannot be compiled here "
            "(pip install 'jax[tpu]'); the figures are the analytic model's."
        )
    if devices.slices > 1:
        return "several slices are not compiled for; the figures are the analytic model's."
    return None


def compiled(config: Any, info: Any, devices: Devices) -> Compiled:
    """Compiles the step for `devices`, which need not be here. Takes minutes for a large network.

    Raises:
      UserError: there is no compiler for them, or the step does not fit (the compiler's words).
    """
    if reason := why_not(devices):
        raise UserError(f"--compile: {reason}")
    from jax.experimental import topologies

    started = time.time()
    with _alone():
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=devices.topology)
        except Exception as error:
            first = str(error).splitlines()[0]
            raise UserError(f"--compile: libtpu knows no {devices.topology}: {first}") from error
    mesh = meshes.make({axis: config.mesh[axis] for axis in meshes.AXES}, topology.devices)
    exp, frozen = trace.build(config, info, mesh)
    state, batch = trace.arguments(exp, info, frozen)
    step = steps.compile_step(trace.step(exp), exp.placed(state), exp.layout)
    try:
        done = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"--compile: {_used(str(error))}") from error
    memory = done.memory_analysis()
    return Compiled(
        topology=devices.topology,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=getattr(memory, "peak_memory_in_bytes", 0),
        messages=collectives(done.as_text()),
        seconds=time.time() - started,
    )


def _used(message: str) -> str:
    """The compiler's sentence that says how much was wanted."""
    lines = [line.strip() for line in message.splitlines() if "Used" in line or "xceeded" in line]
    return lines[0] if lines else message.splitlines()[0]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Tells libtpu that there is no TPU to look for; else it asks, waits and complains."""
    if jax.default_backend() == "tpu":
        yield
        return
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
            "TPU_ACCELERATOR_TYPE": "v5p-8"}  # fmt: skip
    new = {name: value for name, value in told.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
