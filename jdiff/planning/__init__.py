"""What a training step will take on devices that are not here: memory, operations, messages, time.

`plan(config, info, devices)` traces the step on shapes, spreads it over the mesh and walks it.
Who lives here: `chips` are facts, `program` flattens a jaxpr, `spread` does what XLA's partitioner
does, `memory` what its buffer assignment does, `roofline` adds up seconds, `trace` makes the step
of a config, `plan` puts it together, `hints` asks what if, and `ahead` asks the compiler.
"""

from jdiff.planning.chips import CHIPS, Chip, Devices, devices
from jdiff.planning.hints import Hints, hints
from jdiff.planning.plan import Memory, Plan, Time, plan

__all__ = [
    "CHIPS",
    "Chip",
    "Devices",
    "Hints",
    "Memory",
    "Plan",
    "Time",
    "devices",
    "hints",
    "plan",
]
