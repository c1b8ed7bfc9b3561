"""Where the time of a run went: bars, the name of the bottleneck, and what to do about it."""

from collections.abc import Callable, Mapping
from typing import Any

from jdiff.report.facts import Facts
from jdiff.report.figures import duration, number, percent

# Name in the files -> (what it is called, its colour in the style). The order is that of the bars.
_RUN = {
    "steps": ("training steps", "c-compute"),
    "input": ("waiting for data", "c-input"),
    "checkpoint": ("saving checkpoints", "c-checkpoint"),
    "samples": ("drawing samples", "c-samples"),
    "logging": ("logging", "c-logging"),
    "compile": ("compiling", "c-compile"),
    "start": ("starting", "c-start"),
    "profile": ("profiling", "c-other"),
    "other": ("other", "c-other"),
}
_TRACE = {
    "compute": ("computing", "c-compute"),
    "collectives": ("collectives, not hidden", "c-collectives"),
    "transfers": ("copies to and from the host", "c-start"),
    "gaps": ("between operations", "c-gaps"),
    "input": ("waiting for data", "c-input"),
    "checkpoint": ("saving checkpoints", "c-checkpoint"),
    "samples": ("drawing samples", "c-samples"),
    "logging": ("logging", "c-logging"),
    "compile": ("compiling", "c-compile"),
    "host": ("waiting for the host", "c-other"),
}
_NAMED = 0.05  # a share below this is no bottleneck
_LONG = 0.25  # a start above this share is worth a word
_SHOWN = 0.0005  # nor is one below this drawn


def timing(facts: Facts) -> dict[str, Any] | None:
    """What the page's section on time shows, or None if nothing is known."""
    bars = []
    if sum(facts.spent.values()) > 0:
        bars.append({
            "title": "The whole run", "note": f"{duration(sum(facts.spent.values()))} of wall time",
            "parts": _parts(facts.spent, _RUN, duration),
            "sentence": bottleneck(facts.spent, facts.config_of),
        })  # fmt: skip
    trace = facts.trace
    if trace:
        bars.append({
            "title": "Traced steps", "note": _traced(trace),
            "parts": _parts(trace["split"], _TRACE, _per_step(trace)),
            "sentence": traced_bottleneck(trace),
        })  # fmt: skip
    if not bars:
        return None
    return {"bars": bars, "operations": _operations(trace) if trace else []}


def bottleneck(spent: Mapping[str, float], config: Mapping[str, Any]) -> str:
    """Sentences on what else than training takes most of a run's time, and what to do."""
    whole = sum(spent.values())
    once = sum(spent.get(name, 0.0) for name in _ONCE)
    share = lambda name: spent.get(name, 0.0) / max(whole - once, 1e-9)
    worst = max(_ADVICE, key=share)
    if share(worst) < _NAMED:
        text = (
            f"After the start {percent(share('steps'))} of the time goes into the training steps "
            "themselves; a trace of some says what in them is dear: jdiff train --profile."
        )
    else:
        what, advice = _ADVICE[worst]
        text = f"After the start {percent(share(worst))} of the time goes into {what}: "
        text += _filled(advice, config)
    if once > _LONG * whole:
        text += (
            f" The start is {percent(once / whole)} of all; compiled programs are kept for the "
            "next one unless config.compile_cache is off."
        )
    return text


_ONCE = ("start", "compile", "profile")
_ADVICE = {
    "input": (
        "waiting for data, while no step runs",
        "more config.data.threads ({data.threads} now), images prepared at the size they are "
        "trained at, or a quicker disk",
    ),
    "checkpoint": (
        "the part of saving that the loop waits for",
        "a larger config.train.checkpoint_every ({train.checkpoint_every} now)",
    ),
    "samples": (
        "drawing samples",
        "a larger config.train.sample_every ({train.sample_every} now), or fewer "
        "config.sampling.grid.steps ({sampling.grid.steps} now)",
    ),
    "logging": (
        "writing metrics",
        "a larger config.train.log_every ({train.log_every} now)",
    ),
    "other": (
        "none of the known parts",
        "a trace shows what the host does: jdiff train --profile",
    ),
}


def traced_bottleneck(trace: Mapping[str, Any]) -> str:
    """A sentence on what else than computing takes most of a device's time in traced steps."""
    split, whole = trace["split"], trace["seconds"]
    waits = {name: seconds for name, seconds in split.items() if name in _TRACED_ADVICE}
    worst = max(waits, key=waits.get, default=None)
    if worst is None or waits[worst] < _NAMED * whole:
        first = trace["dearest"][0] if trace["dearest"] else None
        most = f"; the dearest operation takes {percent(first['seconds'] / whole)}" if first else ""
        return f"A device computes {percent(split['compute'] / whole)} of the time{most}."
    kinds = list(trace["collectives"])
    kind = f", most of it {kinds[0]}" if worst == "collectives" and kinds else ""
    what, advice = _TRACED_ADVICE[worst]
    return f"A device spends {percent(waits[worst] / whole)} of the time {what}{kind}: {advice}."


_TRACED_ADVICE = {
    "collectives": (
        "in collectives that nothing hides",
        "more images a device, fewer parts in config.mesh.fsdp and config.mesh.tensor, or "
        "config.train.accumulate; on simulated devices this is waiting for cores",
    ),
    "transfers": (
        "waiting for copies to or from the host",
        "fewer metrics or samples; batches go as uint8 already",
    ),
    "gaps": (
        "between the operations of a program",
        "a larger batch, or config.model.scan=False, makes operations longer",
    ),
    "input": ("waiting for data", "more config.data.threads, or smaller images on disk"),
    "checkpoint": ("waiting for a checkpoint", "a larger config.train.checkpoint_every"),
    "samples": ("drawing samples", "a larger config.train.sample_every"),
    "logging": ("waiting while metrics are written", "a larger config.train.log_every"),
    "host": ("waiting for the host to start the next step", "a larger batch"),
}


def _filled(advice: str, config: Mapping[str, Any]) -> str:
    for name, value in config.items():
        advice = advice.replace(f"{{{name}}}", number(value) if isinstance(value, int) else "?")
    return advice + "."


def _parts(
    seconds: Mapping[str, float], names: Mapping[str, tuple], written: Callable[[float], str]
) -> list[dict[str, str]]:
    whole = sum(seconds.values())
    return [
        {"name": name, "colour": colour, "width": f"{100 * seconds[key] / whole:.3f}",
         "share": percent(seconds[key] / whole), "value": written(seconds[key])}
        for key, (name, colour) in names.items()
        if seconds.get(key, 0.0) > _SHOWN * whole
    ]  # fmt: skip


def _per_step(trace: Mapping[str, Any]) -> Callable[[float], str]:
    return lambda seconds: f"{number(1e3 * seconds / len(trace['steps']))} ms"


def _traced(trace: Mapping[str, Any]) -> str:
    steps, devices = trace["steps"], trace["devices"]
    mean = f", mean of {devices} devices" if devices > 1 else ""
    which = f"{number(steps[0])} to {number(steps[-1])}" if len(steps) > 1 else number(steps[0])
    each = _per_step(trace)(trace["seconds"])
    hidden = f"; {_per_step(trace)(trace['hidden'])} of collectives are hidden behind computing"
    return f"{which}, {each} a step{mean}{hidden if trace['hidden'] else ''}"


def _operations(trace: Mapping[str, Any]) -> list[dict[str, str]]:
    each = _per_step(trace)
    longest = max((o["seconds"] for o in trace["dearest"]), default=0.0)
    rows = []
    for o in trace["dearest"]:
        about = [o["kind"]] if o["kind"] != "compute" else []
        rows.append({
            "name": o["doing"] or o["name"],
            "about": " · ".join([*about, *filter(None, [o["place"], o["doing"] and o["name"]])]),
            "colour": "c-collectives" if o["kind"] == "collective" else "c-compute",
            "calls": _calls(o["count"] / len(trace["steps"])), "time": each(o["seconds"]),
            "width": f"{100 * o['seconds'] / longest:.2f}",
            "share": percent(o["seconds"] / trace["seconds"]),
        })  # fmt: skip
    return rows


def _calls(count: float) -> str:
    return number(round(count)) if abs(count - round(count)) < 1e-6 else number(count)
