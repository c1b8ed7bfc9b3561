"""jdiff plan: what training a config would take on devices that are not here."""

import argparse
import json
from typing import Any

from jdiff.errors import UserError

SUMMARY = "what training would take on devices that are not here: memory, messages, time"
DESCRIPTION = """\
Counts what one training step of a config keeps, computes and sends on each device of a mesh: of
parameters, optimiser, averages, gradients and activations the bytes; the operations; the bytes of
every kind of collective; and how long the step takes at best by the chip's roofline, with its model
FLOPs utilisation (MFU). Nothing runs, no data is read, and the devices need not exist.

The counts are made in the step's own program, traced on shapes and spread over config.mesh as the
compiler does. The time is a bound: kernels reach a part of it.

DEVICES are v4-N, v5p-N (TPU slices named by TensorCores: v5p-256 has 128 chips), v5e-N, v6e-N (by
chips), 2xv5p-256 (two slices), NxA100, NxA100-40, NxH100, NxH200, NxB200, or N (of this machine's
kind).

Where libtpu is installed, --compile asks the TPU compiler itself, for a slice that is not here."""
EXAMPLES = """\
examples:
  jdiff plan --config=configs/imagenet64_edm.py --devices=v5p-256
  jdiff plan --config=configs/imagenet64_edm.py --devices=64xH200 --config.mesh.fsdp=8
  jdiff plan --config=configs/digits_dit_flow.py --devices=8xA100 --json
  jdiff plan --config=my.py --devices=v5e-16 --shape=64,64,3 --classes=1000 --compile"""


_ASK = "these are the analytic model's figures; --compile asks the TPU compiler itself."


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:TEXT]",
        help="a Python file with get_config(); with :TEXT, get_config(TEXT) is called; its fields "
        "can be overridden as for `jdiff train`",
    )  # fmt: skip
    parser.add_argument(
        "--devices", required=True, metavar="DEVICES", help="e.g. v5p-256, 64xH200, 8xA100, 8"
    )
    parser.add_argument(
        "--shape", type=_shape, metavar="H,W,C", help="of an image, for a set that is not prepared"
    )
    parser.add_argument(
        "--classes", type=int, metavar="N", help="of the data, for a set that is not prepared"
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="also compile the step for the absent devices (TPUs, with libtpu; takes minutes)",
    )  # fmt: skip
    parser.add_argument(
        "--no-hints", action="store_true", help="leave out the what-if hints, each another trace"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Plans and prints."""
    from jdiff import config, planning, staged
    from jdiff.planning import ahead, shapes

    settings = staged.one(config.load(args.config, args.overrides), "plan")
    devices = planning.devices(args.devices)
    info = shapes.info(settings, args.shape, args.classes)
    reason = ahead.why_not(devices)
    if args.compile and reason:
        raise UserError(f"--compile: {reason}")
    planned = planning.plan(settings, info, devices)
    found = None if args.no_hints else planning.hints(settings, info, devices, planned)
    compiled = ahead.compiled(settings, info, devices) if args.compile else None
    if args.json:
        print(json.dumps(as_json(planned, found, compiled), indent=2))
        return 0
    from rich.console import Console

    from jdiff.planning import show

    console = Console(highlight=False, markup=False)
    show.show(console, planned, found, compiled)
    if compiled is None:
        console.print(f"note      {reason or _ASK}", soft_wrap=True)
    return 0


def as_json(planned: Any, found: Any, compiled: Any) -> dict[str, Any]:
    """The plan as plain numbers: bytes, operations, seconds."""
    import dataclasses

    from jdiff.planning.plan import by_kind

    chip, memory, time = planned.devices.chip, planned.memory, planned.time
    table = by_kind(planned.messages, planned.mesh)
    return {
        "devices": {"given": planned.devices.word, "chip": chip.name,
                    "count": planned.devices.count, "slices": planned.devices.slices},
        "mesh": planned.mesh,
        "batch_size": planned.batch_size,
        "parameters": planned.parameters,
        "memory": dataclasses.asdict(memory) | {
            "state": memory.state, "total": memory.total, "capacity": planned.capacity,
            "fits": planned.fits,
        },
        "flops": planned.flops,
        "device": {"flops": planned.work.flops + planned.work.wide, "moved": planned.work.moved},
        "collectives": [
            {"kind": kind, "axes": axes, **row} for (kind, axes), row in table.items()
        ],
        "time": None if time is None else dataclasses.asdict(time) | {
            "step": time.step, "bound": time.bound, "mfu": planned.mfu,
            "images_per_second": planned.batch_size / time.step,
        },
        "hints": None if found is None else dataclasses.asdict(found),
        "compiled": None if compiled is None else {
            "topology": compiled.topology, "arguments": compiled.arguments,
            "temporary": compiled.temporary, "peak": compiled.peak, "seconds": compiled.seconds,
        },
    }  # fmt: skip


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(
            f"{text}: three positive numbers are wanted, height, width and channels"
        )
    return tuple(int(p) for p in parts)
