"""What to change: the largest batch that fits, the least splitting that fits."""

import dataclasses
from typing import Any

from jdiff.errors import UserError
from jdiff.parallel.mesh import fit
from jdiff.planning.chips import Devices
from jdiff.planning.plan import Plan, plan

#: Traces at most to find a batch: two make a line, the others check it.
TRIES = 4


@dataclasses.dataclass(frozen=True)
class Hints:
    """Answers to what-if questions; None where there is none, or memory is not known.

    Attributes:
      largest_batch: of the whole mesh, that fits as it is.
      smallest_fsdp: that fits with this batch, data taking the devices that it leaves.
      with_remat: bytes of a device if every block is computed again (config.model.remat=True).
    """

    largest_batch: int | None = None
    smallest_fsdp: int | None = None
    with_remat: int | None = None


def hints(config: Any, info: Any, devices: Devices, planned: Plan) -> Hints:
    """Plans variants of the config; each is another trace, seconds for a large network."""
    if planned.capacity is None:
        return Hints()
    remat = None
    if not planned.fits and not config.model.get("remat", False):
        remat = _total(config, info, devices, {"model.remat": True})
    return Hints(
        largest_batch=largest_batch(config, info, devices, planned),
        smallest_fsdp=smallest_fsdp(config, info, devices),
        with_remat=remat,
    )


def largest_batch(config: Any, info: Any, devices: Devices, planned: Plan) -> int | None:
    """The largest multiple of the mesh's parts of a batch that fits, or None if not even one does.

    Memory is a line in the batch, nearly: two plans give it, further ones check the answer.
    """
    unit = planned.mesh["data"] * planned.mesh["fsdp"] * config.train.accumulate
    memory = lambda units: _total(config, info, devices, {"train.batch_size": units * unit})
    known = {planned.batch_size // unit: planned.memory.total}
    known[1 if max(known) > 1 else 2] = memory(1 if max(known) > 1 else 2)
    best = None
    for _ in range(TRIES):
        (a, low), (b, high) = sorted(known.items())[-2:]
        each = max((high - low) / (b - a), 1.0)
        guess = int(b + (planned.capacity - high) // each)
        fitting = [n for n, total in known.items() if total <= planned.capacity]
        best = max(fitting, default=None)
        if guess < 1 or guess in known or (best is not None and best <= guess < 1.02 * best):
            break
        known[guess] = memory(guess)
    fitting = [n for n, total in known.items() if total <= planned.capacity]
    return max(fitting) * unit if fitting else None


def smallest_fsdp(config: Any, info: Any, devices: Devices) -> int | None:
    """The smallest config.mesh.fsdp that fits with this batch; data takes what it leaves."""
    sizes = fit({axis: config.mesh[axis] for axis in ("tensor", "sequence")}, devices.count)
    free = devices.count // (sizes["tensor"] * sizes["sequence"])
    for fsdp in range(1, free + 1):
        if free % fsdp:
            continue
        changed = {"mesh.fsdp": fsdp, "mesh.data": free // fsdp}
        try:
            planned = plan(changed_config(config, changed), info, devices)
        except UserError:  # a batch that does not divide
            continue
        if planned.fits:
            return fsdp
    return None


def changed_config(config: Any, fields: dict[str, Any]) -> Any:
    """A copy with these fields, named by their paths."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for path, value in fields.items():
            *sections, name = path.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[name] = value
    return config


def _total(config: Any, info: Any, devices: Devices, fields: dict[str, Any]) -> int | None:
    try:
        return plan(changed_config(config, fields), info, devices).memory.total
    except UserError:  # a network without this field
        return None
