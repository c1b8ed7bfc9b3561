"""TPU slices: which topologies exist, how many hosts they have, and what Google calls them.

Sources: the Cloud TPU pages of each generation ("Configurations") and GKE's "Plan TPUs in GKE".
"""

import dataclasses
import itertools
import math

from jdiff.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPUs.

    Attributes:
      label: GKE's cloud.google.com/gke-tpu-accelerator.
      type: the prefix of gcloud's --accelerator-type, such as v5litepod in v5litepod-16.
      cores: what that type counts for each chip: TensorCores (2) or chips (1).
      dimensions: of the torus that joins the chips.
      largest: chips of the largest slice.
      runtime: gcloud's --version, the software of the TPU VMs; None if it is not published.
    """

    label: str
    type: str
    cores: int
    dimensions: int
    largest: int
    runtime: str | None


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, 3, 4096, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, 2, 256, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, 3, 6144, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, 2, 256, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x", 2, 3, 9216, None),
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # below a cube of 4 x 4 x 4


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined directly, and the hosts that they sit in.

    Attributes:
      generation: a key of GENERATIONS.
      topology: such as 4x4x8.
      chips, hosts: how many.
    """

    generation: str
    topology: str
    chips: int
    hosts: int

    @property
    def chips_per_host(self) -> int:
        """Chips of one host, which is one node or VM."""
        return self.chips // self.hosts

    @property
    def type(self) -> str:
        """gcloud's --accelerator-type, such as v5p-256."""
        made = GENERATIONS[self.generation]
        return f"{made.type}-{self.chips * made.cores}"


def parse(accelerator: str, topology: str | None = None) -> Slice:
    """The slice that a name stands for.

    Args:
      accelerator: a generation (v5p) with a topology, or a type (v5p-256) whose topology is then
        the one nearest a cube. What the number counts is Google's: TensorCores for v4, v5p and
        tpu7x (v5p-256 has 128 chips), chips for v5e and v6e.
      topology: such as 4x4x8.

    Raises:
      UserError: no such generation, number of chips or topology, naming the nearest that exist.
    """
    prefix, dash, number = accelerator.lower().rpartition("-")
    if not dash:
        prefix, number = accelerator.lower(), ""
    known = {made.type: name for name, made in GENERATIONS.items()} | {g: g for g in GENERATIONS}
    generation = known[choose("--accelerator: generation", prefix, known)]
    made = GENERATIONS[generation]
    if topology is None and not number.isdigit():
        raise UserError(
            f"--accelerator={accelerator}: say how large, as {made.type}-{8 * made.cores}, or "
            f"--topology={'2x2x2' if made.dimensions == 3 else '2x4'}."
        )
    if topology is None:
        topology = _nearest_cube(accelerator, generation, int(number))
    check(generation, topology)
    chips = math.prod(map(int, topology.split("x")))
    if number.isdigit() and int(number) != chips * made.cores:
        raise UserError(
            f"--accelerator={accelerator} has {int(number) // made.cores} chips, and "
            f"--topology={topology} has {chips}: {made.type}-{chips * made.cores}."
        )
    alone = chips if made.dimensions == 2 and chips <= 8 else 4  # chips of the host of small slices
    return Slice(generation, topology, chips, max(1, chips // alone))


def check(generation: str, topology: str) -> None:
    """Raises a UserError unless slices of this generation come in this topology.

    In two dimensions there is a list. In three there are 2x2x1 to 2x4x4, and from 4x4x4 on all
    whose sides are multiples of 4 that do not decrease.
    """
    made = GENERATIONS[generation]
    where = f"--topology={topology} does not exist for TPU {generation}"
    parts = topology.split("x")
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) != made.dimensions:
        example = "4x4x8" if made.dimensions == 3 else "4x8"
        raise UserError(
            f"{where}: its chips are joined in {made.dimensions} dimensions, as {example}."
        )
    sides = tuple(map(int, parts))
    if made.dimensions == 2:
        if topology not in _FLAT:
            raise UserError(f"{where}. Allowed: {', '.join(_FLAT)}.")
    elif topology not in _SMALL:
        if any(side % 4 for side in sides):
            small = ", ".join(_SMALL)
            raise UserError(f"{where}: sides are multiples of 4, or it is one of {small}.")
        if list(sides) != sorted(sides):
            right = "x".join(map(str, sorted(sides)))
            raise UserError(f"{where}: sides do not decrease. Did you mean {right}?")
        if math.prod(sides) > made.largest:
            raise UserError(f"{where}: {math.prod(sides)} chips; {made.largest} at most.")


def _nearest_cube(accelerator: str, generation: str, number: int) -> str:
    """The topology with this many cores whose sides differ least."""
    made = GENERATIONS[generation]
    chips = number // made.cores
    found = [t for t in _topologies(generation, chips) if number == chips * made.cores]
    if not found:
        sizes = sorted({math.prod(map(int, t.split("x"))) for t in _all(generation)})
        below = max((s for s in sizes if s < number / made.cores), default=None)
        above = min((s for s in sizes if s > number / made.cores), default=None)
        near = [f"{made.type}-{s * made.cores}" for s in (below, above) if s is not None]
        raise UserError(f"--accelerator={accelerator} does not exist. Nearest: {', '.join(near)}.")
    return min(found, key=lambda t: sum(map(int, t.split("x"))))


def _topologies(generation: str, chips: int) -> list[str]:
    return [t for t in _all(generation) if math.prod(map(int, t.split("x"))) == chips]


def _all(generation: str) -> list[str]:
    made = GENERATIONS[generation]
    if made.dimensions == 2:
        return list(_FLAT)
    cubes = made.largest // 64
    large = [
        f"{4 * a}x{4 * b}x{4 * c}"
        for a, b in itertools.combinations_with_replacement(range(1, 25), 2)
        for c in range(b, cubes // (a * b) + 1)
    ]
    return [*_SMALL, *large]
