"""A plan for the eye: tables of memory, messages and time, and what to change."""

from typing import Any

from jdiff.planning.ahead import Compiled
from jdiff.planning.hints import Hints
from jdiff.planning.plan import Plan, by_kind

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def show(console: Any, plan: Plan, hints: Hints | None, compiled: Compiled | None) -> None:
    """Prints a plan on a rich console."""
    chip = plan.devices.chip
    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items() if n > 1) or "one device"
    slices = f" in {plan.devices.slices} slices" if plan.devices.slices > 1 else ""
    console.print(f"devices   {plan.devices.count} x {chip.name}{slices}; mesh: {mesh}")
    each = plan.batch_size / (plan.mesh["data"] * plan.mesh["fsdp"])
    console.print(f"network   {plan.parameters:,} parameters; batch {plan.batch_size:,}, "
                  f"{each:g} a part")  # fmt: skip
    console.print(_memory(plan))
    if plan.messages:
        console.print(_messages(plan))
    console.print(_time(plan))
    for line in _verdict(plan, hints):
        console.print(line, soft_wrap=True)
    if compiled is not None:
        console.print(
            f"compiler  {compiled.topology}: arguments {size(compiled.arguments)}, temporaries "
            f"{size(compiled.temporary)}, peak {size(compiled.peak)} a device "
            f"({compiled.seconds:.0f} s to compile)", soft_wrap=True,
        )  # fmt: skip


def size(bytes: float) -> str:
    """Bytes in decimal units: 1.23 GB."""
    return _scaled(bytes, 1000.0, _UNITS)


def rate(flops: float) -> str:
    """Operations: 4.56 TFLOP."""
    return _scaled(flops, 1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def seconds(value: float) -> str:
    """1.23 s, 4.5 ms, 67 us, or 0."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 0.9995:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value else "0"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {units[power]}"


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _memory(plan: Plan) -> Any:
    m = plan.memory
    table = _table("\nmemory of a device", "\nbytes", "\nshare")
    rows = {
        "parameters": m.params, "optimiser": m.optimizer, "averages (EMA)": m.averages,
        "teacher": m.frozen, "batch": m.batch, "gradients": m.gradients,
        "activations": m.activations, "in all": m.total,
    }  # fmt: skip
    for name, value in rows.items():
        if value or name != "teacher":
            table.add_row(name, size(value), f"{100 * value / m.total:.0f} %")
    return table


def _messages(plan: Plan) -> Any:
    table = _table("\nmessages of a step", "\nalong", "\ncount", "\nresults", "\nsent a device")
    for (kind, axes), row in by_kind(plan.messages, plan.mesh).items():
        table.add_row(
            kind, " x ".join(axes), f"{row['count']:,}", size(row["bytes"]), size(row["sent"])
        )
    return table


def _time(plan: Plan) -> Any:
    table = _table("\nstep at best", "\n")
    table.add_row("operations, all devices", rate(plan.flops))
    again = plan.work.flops + plan.work.wide
    table.add_row("operations, a device (what is computed again, too)", rate(again))
    if plan.time is None:
        return table
    t = plan.time
    table.add_row("products at the peak", seconds(t.products))
    table.add_row("all else at memory's rate", seconds(t.bandwidth))
    if plan.messages:
        table.add_row("messages beside them", seconds(t.hidden))
        table.add_row("messages that are waited for", seconds(t.waited))
    table.add_row("step", seconds(t.step))
    table.add_row("images a second", f"{plan.batch_size / t.step:,.0f}")
    table.add_row("MFU", f"{100 * plan.mfu:.1f} %")
    return table


def _verdict(plan: Plan, hints: Hints | None) -> list[str]:
    lines = [""]
    chip = plan.devices.chip
    if plan.capacity is not None:
        share = "" if chip.usable == 1 else f" ({chip.usable:.0%} of {size(chip.memory)})"
        word = "fits" if plan.fits else "does NOT fit"
        lines.append(
            f"memory    {word}: {size(plan.memory.total)} of {size(plan.capacity)}{share} a device"
        )
        if not plan.fits and plan.memory.total <= 0.95 * chip.memory:
            lines.append("          XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 makes it fit")
    else:
        lines.append(f"memory    that of {chip.name} is not known")
    if plan.time is None:
        lines.append(f"time      no peak or bandwidth is published for {chip.name}")
    else:
        lines.append(f"bound by  {plan.time.bound}")
    if hints is None or plan.capacity is None:
        return lines
    if hints.largest_batch is None:
        lines.append("hint      not even the smallest batch fits on this mesh")
    else:
        lines.append(f"hint      largest batch that fits: {hints.largest_batch:,}")
    if hints.smallest_fsdp is None:
        lines.append("hint      no config.mesh.fsdp makes this batch fit")
    else:
        lines.append(f"hint      smallest config.mesh.fsdp that fits: {hints.smallest_fsdp}")
    if hints.with_remat is not None:
        lines.append(f"hint      config.model.remat=True: {size(hints.with_remat)} a device")
    return lines
