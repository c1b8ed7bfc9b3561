"""What a training step will take on devices that are not here: memory, operations, messages, time.

`plan(config, info, devices)` traces the step on shapes, spreads it over the mesh and walks it.
Who lives here: `chips` are facts, `program` flattens a jaxpr, `kinds` names its operations,
`spread` does what XLA's partitioner does, `memory` what its buffer assignment does (`cpu`: on CPU
alone), `roofline` adds up seconds, `trace` makes the step of a config, `shapes` says what the data
is, `plan` puts it together, `hints` asks what if, `ahead` asks the compiler, `show` prints.
"""

from jdiff.planning.chips import CHIPS, Chip, Devices, devices
from jdiff.planning.hints import Hints, hints
from jdiff.planning.plan import Memory, Plan, Time, of_traced, plan
from jdiff.planning.trace import Traced, of_step

__all__ = [
    "CHIPS", "Chip", "Devices", "Hints", "Memory", "Plan", "Time", "Traced", "devices", "hints",
    "of_step", "of_traced", "plan",
]  # fmt: skip
