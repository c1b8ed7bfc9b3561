"""Accelerators as their makers describe them, and words for them: `v5p-256`, `64xH200`, `8`.

Figures are of one device as jax sees it: a TPU chip (v4 and v5p join its two cores), or one GPU.
Links count one direction, all of a device's together: a bound, reached by collectives that use all.
"""

import dataclasses
import difflib
import re

from jdiff.errors import UserError
from jdiff.models.flops import PEAKS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      peak: bfloat16 operations a second; None where nobody publishes one.
      single: the same of float32 products at jax's default precision: one bfloat16 pass on a TPU,
        TF32 on a GPU.
      memory: bytes.
      usable: share of them that jax takes; on GPUs XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by default.
      bandwidth: bytes a second to and from that memory.
      link: bytes a second that it sends to its neighbours (ICI, NVLink).
      joined: devices that such links join; None for all of a TPU slice.
      network: bytes a second that it sends beyond them, its share of its host's.
    """

    name: str
    peak: float | None = None
    single: float | None = None
    memory: float | None = None
    usable: float = 1.0
    bandwidth: float | None = None
    link: float | None = None
    joined: int | None = None
    network: float | None = None


def _tpu(name: str, memory: float, bandwidth: float, link: float, network: float) -> Chip:
    peak = PEAKS[f"tpu-{name}"]
    return Chip(name, peak, peak, memory * GIB, 1.0, bandwidth, link, None, network)


def _gpu(
    name: str, peak: str, single: float, memory: float, bandwidth: float, link: float,
    network: float,
) -> Chip:  # fmt: skip
    return Chip(name, PEAKS[peak], single, memory * GIB, 0.75, bandwidth, link, 8, network)


#: By name. TPUs: Google Cloud documentation, "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", system
#: architecture: HBM capacity and bandwidth, and interchip interconnect bandwidth a chip (2400,
#: 1600, 4800 and 3584 Gbit/s). Between slices: a host's network over its chips (200 Gbit/s for 4 of
#: v4 and v5p, 100 for 4 of v5e, 400 for 4 of v6e). GPUs: NVIDIA's data sheets of the SXM modules:
#: TF32 without sparsity, memory, NVLink (half of the sum of both directions), and between machines
#: the network of an HGX / DGX node of eight: 200 Gbit/s a GPU for A100, 400 for the others.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 32, 1228e9, 300e9, 6.25e9),
        _tpu("v5e", 16, 819e9, 200e9, 3.125e9),
        _tpu("v5p", 95, 2765e9, 600e9, 6.25e9),
        _tpu("v6e", 32, 1640e9, 448e9, 12.5e9),
        _gpu("a100-40", "a100", 156e12, 40, 1555e9, 300e9, 25e9),
        _gpu("a100-80", "a100", 156e12, 80, 2039e9, 300e9, 25e9),
        _gpu("h100", "h100", 494.7e12, 80, 3350e9, 450e9, 50e9),
        _gpu("h200", "h200", 494.7e12, 141, 4800e9, 450e9, 50e9),
        _gpu("b200", "b200", 1100e12, 180, 8000e9, 900e9, 50e9),
        Chip("cpu"),
    )
}
#: Other words for them.
ALIASES = {"a100": "a100-80", "v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}
#: TPUs whose slices are named by TensorCores, two a chip: v5p-256 has 128 chips.
BY_CORES = ("v4", "v5p")
#: TPUs on a three-dimensional torus; the others lie on a plane.
TORUS_3D = ("v4", "v5p")


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a plan is for.

    Attributes:
      count: devices in all.
      slices: TPU slices among which they are shared; joined by the hosts' network only.
    """

    word: str
    chip: Chip
    count: int
    slices: int = 1

    @property
    def joined(self) -> int:
        """Devices whose links join them: those of a slice, or of a machine."""
        return self.chip.joined or self.count // self.slices

    @property
    def topology(self) -> str:
        """Of one slice as libtpu names it, e.g. v5p:4x4x8."""
        sides = sides_of(self.count // self.slices, 3 if self.chip.name in TORUS_3D else 2)
        return f"{self.chip.name}:{'x'.join(map(str, sides))}"


def devices(word: str) -> Devices:
    """What `--devices` means: `v5p-256`, `2xv5e-256`, `64xH200`, `H100`, `8xcpu`, `8` (as here).

    Raises:
      UserError: no such kind, with the nearest one; or no such number of them.
    """
    text = word.strip().lower().removeprefix("tpu-")
    if text.isdigit():
        return Devices(word, local(), _positive(word, int(text)))
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([a-z]\w*?(?:-[48]0)?)(?:-(\d+))?", text)
    times, name, number = match.groups() if match else (None, text, None)
    name = ALIASES.get(name, name)
    if not match or name not in CHIPS:
        raise UserError(_unknown(word, name))
    times, chip = _positive(word, int(times or 1)), CHIPS[name]
    if f"tpu-{name}" not in PEAKS:
        if number is not None:
            raise UserError(f"--devices={word}: write {number}x{name} for {number} of them.")
        return Devices(word, chip, times)
    if number is None:
        per = 2 if name in BY_CORES else 1
        raise UserError(f"--devices={word}: name a slice, e.g. {name}-{8 * per} (8 chips).")
    chips = _positive(word, int(number))
    if name in BY_CORES:
        if chips % 2:
            raise UserError(
                f"--devices={word}: {name} slices are named by TensorCores, two a chip: an even "
                f"number, e.g. {name}-{chips + 1}."
            )
        chips //= 2
    return Devices(word, chip, times * chips, times)


def local() -> Chip:
    """The kind of this machine's devices."""
    import jax

    return named(jax.devices()[0].device_kind)


def named(kind: str) -> Chip:
    """What jax calls a `device_kind`: "TPU v5 lite", "NVIDIA H100 80GB HBM3", "cpu"."""
    words = re.split(r"[\s\-_]+", kind.lower().replace(" lite", "e"))
    words = ["v5p" if word == "v5" else word for word in words]
    if "a100" in words:
        return CHIPS["a100-40" if "40gb" in words else "a100-80"]
    return next((CHIPS[word] for word in words if word in CHIPS), Chip(kind))


def sides_of(chips: int, dimensions: int) -> tuple[int, ...]:
    """The sides of a slice, in rising order, as even as powers of two allow: 128 is 4 x 4 x 8.

    Raises:
      UserError: not a power of two.
    """
    power = chips.bit_length() - 1
    if 2**power != chips:
        raise UserError(f"a slice of {chips} chips has no usual topology; powers of two have.")
    each, more = divmod(power, dimensions)
    sides = sorted(2 ** (each + (i < more)) for i in range(dimensions))
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)
    return tuple(sides)


def _positive(word: str, count: int) -> int:
    if count < 1:
        raise UserError(f"--devices={word}: at least one device.")
    return count


def _unknown(word: str, name: str) -> str:
    known = [*CHIPS, *ALIASES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f" Did you mean {_example(ALIASES.get(near[0], near[0]))}?" if near else ""
    return (
        f"--devices={word}: no such kind of device.{hint} Known: {', '.join(CHIPS)}; written like "
        "v5p-256 (a slice), 2xv5e-256 (two), 64xH200, or 8 (as many of this machine's kind)."
    )


def _example(name: str) -> str:
    return f"{name}-{16 if name in BY_CORES else 8}" if f"tpu-{name}" in PEAKS else f"8x{name}"
