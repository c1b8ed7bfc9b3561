"""The page: facts arranged for the template, and the file written."""

import datetime
import math
import pathlib
import shlex
from typing import Any

from jdiff import kinds
from jdiff.report import charts, files
from jdiff.report.facts import Facts, gather
from jdiff.report.figures import duration, number, percent
from jdiff.report.timing import timing
from jdiff.report.words import Words

# Squared distances are drawn on a root scale: their noise is thousands of times their floor.
_SQUARED = ("frechet", "kernel")
_BARS = 20  # classes drawn; of more, the lowest
_OPEN_STATES = {"running": "training", "finished": "finished", "stopped": "stopped",
                "failed": "failed"}  # fmt: skip


def write(workdir: str | pathlib.Path, out: str | pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of a run and returns its path, WORKDIR/report.html unless `out` is given.

    The file is replaced at once or not at all.

    Raises:
      UserError: `workdir` is not a run directory, or the file cannot be written.
    """
    path = pathlib.Path(out) if out else pathlib.Path(workdir) / "report.html"
    return files.save(path, render(workdir))


def render(workdir: str | pathlib.Path) -> str:
    """The report of a run as one HTML text, which needs no other file and no network.

    Raises:
      UserError: `workdir` is not a run directory.
    """
    facts = gather(workdir)
    words = kinds.named(facts.config_of.get("kind", "diffusion")).page(facts)
    return files.page(
        "page.html.j2", ("page.css",), ("page.js", "config.js"),
        title=_title(facts),
        subtitle=_subtitle(facts, words),
        state=_OPEN_STATES.get(facts.run.get("state"), "not begun"),
        cards=_cards(facts),
        pictures=facts.pictures,
        same=words.same,
        shown=words.shown,
        charts=files.svg(_charts(facts, words)),
        evaluation=facts.evaluation and _evaluation(facts.evaluation),
        timing=timing(facts),
        commands=_commands(facts, words),
        config=[(name, _value(value)) for name, value in facts.config],
        environment=_environment(facts),
    )  # fmt: skip


def _title(facts: Facts) -> str:
    return facts.config_of.get("name") or facts.workdir.absolute().name


def _subtitle(facts: Facts, own: Words) -> str:
    data = facts.run.get("data", {})
    words = [*own.parts, facts.config_of.get("data.name")]
    if data.get("shape"):
        words.append(" × ".join(str(n) for n in data["shape"]))
    if data.get("num_classes"):
        words.append(f"{data['num_classes']} classes")
    return " · ".join(str(word) for word in words if word)


def _cards(facts: Facts) -> list[dict[str, str]]:
    """The figures at the top: label, value, and a word on it."""
    cards = []
    add = lambda label, value, note="": cards.append({"label": label, "value": value, "note": note})
    evaluation = facts.evaluation or {}
    for metric in evaluation.get("metrics", []):
        if metric["key"] == "frechet":
            floor, ceiling = number(metric.get("floor")), number(metric.get("ceiling"))
            split = evaluation["settings"].get("floor", "real")
            add(metric["name"], number(metric["value"]), f"{split} split {floor}, noise {ceiling}")
    classifier = evaluation.get("classifier")
    if classifier:
        add("Intended class found", percent(classifier["accuracy"]),
            f"in held-out images {percent(classifier['test_accuracy'])}")  # fmt: skip
    steps, losses = facts.series("loss")
    total = facts.config_of.get("train.steps")
    if steps:
        add("Loss", number(charts.smooth(losses)[-1]), "smoothed, last")
        done = steps[-1]
        add("Steps", number(done), f"of {number(total)}" if total and done < total else "")
    _, rates = facts.series("images_per_s")
    if rates:
        add("Images a second", number(round(_median(rates))), _speed_note(facts))
    parameters = facts.run.get("parameters", facts.run.get("params"))
    if parameters:
        add("Parameters", millions(parameters))
    seconds = seconds_of(facts)
    if seconds is not None:
        add("Wall time", duration(seconds), _device(facts))
    return cards


def _speed_note(facts: Facts) -> str:
    """What stands below the images a second."""
    words = ["median"]
    _, each = facts.series("images_per_s_chip")
    if each and len(facts.run.get("devices", [])) > 1:
        words.append(f"{number(round(_median(each)))} a chip")
    _, used = facts.series("mfu")
    if used:
        words.append(f"MFU {percent(_median(used))}")
    return ", ".join(words)


def _throughput_note(facts: Facts) -> str:
    """The model FLOPs utilisation is proportional to the images a second."""
    _, used = facts.series("mfu")
    return f"images/s; at best MFU {percent(max(used))}" if used else "images/s"


def _charts(facts: Facts, words: Words) -> list[dict[str, Any]]:
    found = []
    steps, losses = facts.series("loss")
    if steps:
        lines = [charts.Line("loss", steps, losses)]
        if len(steps) >= 8:
            lines = [charts.Line("each", steps, losses, "raw"),
                     charts.Line("smoothed", steps, charts.smooth(losses))]  # fmt: skip
        # Two shapes of one chart: the style shows the one that suits the width of the page.
        svg = "".join(
            charts.line_chart(
                lines, title="loss over steps", log=True, width=w, height=h, style=style
            )
            for w, h, style in ((1080, 330, "on-wide"), (420, 260, "on-narrow"))
        )
        note = "log scale" if min(losses) > 0 else ""
        found.append({"title": "Loss", "note": note, "svg": svg, "wide": True})
    small = (("learning_rate", "Learning rate", "", True),
             ("grad_norm", "Gradient norm", "before clipping", False),
             ("images_per_s", "Throughput", _throughput_note(facts), True),
             *((*curve, False) for curve in words.curves))  # fmt: skip
    for name, title, note, zero in small:
        steps, values = facts.series(name)
        if steps:
            svg = charts.line_chart([charts.Line(name, steps, values)], title=f"{title} over steps",
                                    zero=zero, width=420, height=230)  # fmt: skip
            found.append({"title": title, "note": note, "svg": svg, "wide": False})
    return found


def _evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for metric in evaluation.get("metrics", []):
        rows.append({
            "name": metric["name"], "about": metric.get("about", ""),
            "value": number(metric["value"]),
            "exact": repr(metric["value"]),
            "floor": number(metric.get("floor")), "ceiling": number(metric.get("ceiling")),
            "fill": fill(metric),
        })  # fmt: skip
    classifier = evaluation.get("classifier")
    classes, left_out = [], 0
    if classifier:
        per_class = classifier.get("per_class", [])
        kept = sorted(per_class, key=lambda c: c["share"])[:_BARS]
        left_out = len(per_class) - len(kept)
        kept.sort(key=lambda c: c["share"] if left_out else c["label"])
        classes = [
            {"name": c["name"], "share": percent(c["share"]), "num": c["num"],
             "width": f"{100 * c['share']:.2f}"}
            for c in kept
        ]  # fmt: skip
    return {
        "rows": rows,
        "settings": _sentence(evaluation),
        "floor": evaluation.get("settings", {}).get("floor", "real"),
        "classifier": classifier and {
            "accuracy": percent(classifier["accuracy"]),
            "test_accuracy": percent(classifier["test_accuracy"]),
        },
        "pairs": pairs(evaluation.get("pairs")),
        "classes": classes,
        "left_out": left_out,
    }  # fmt: skip


def fill(metric: dict[str, Any]) -> str | None:
    """How far from noise (0) to the training split (100) the value lies, as a CSS number."""
    value, best, worst = metric["value"], metric.get("floor"), metric.get("ceiling")
    if None in (value, best, worst):
        return None
    if metric["key"] in _SQUARED:
        value, best, worst = (math.sqrt(max(v, 0.0)) for v in (value, best, worst))
    if best == worst:
        return None
    return f"{100 * min(1.0, max(0.0, (value - worst) / (best - worst))):.2f}"


def pairs(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """The figures of samples against their truth, for the template."""
    if not found:
        return None
    rows = [
        {"name": row["name"], "about": row["about"], "value": number(row["value"]),
         "exact": repr(row["value"]), "enlarged": number(row["enlarged"])}
        for row in found["rows"]
    ]  # fmt: skip
    note = (
        f"Means over {found['num']:,} held-out images, made smaller and enlarged. A blurred image "
        f"may be nearer to the truth than a sharp one. SSIM's window: {found['window']} pixels."
    )
    return {"rows": rows, "note": note}


def _sentence(evaluation: dict[str, Any]) -> str:
    """How the evaluated samples were drawn, in words."""
    s = evaluation.get("settings", {})
    words = [f"{number(s.get('num'))} {s.get('what', 'samples')}"]
    if "reference" in s:
        words.append(f"against {number(s['reference_images'])} {s['reference']} images")
    words += sampled(s)
    if "features" in s:
        words.append(f"features: {s['features']}")
    if "seed" in s:
        words.append(f"seed {s['seed']}")
    seconds = evaluation.get("seconds", {}).get("total")
    return " · ".join(words) + (f" · {duration(seconds)}" if seconds is not None else "")


def sampled(s: dict[str, Any]) -> list[str]:
    """Checkpoint, weights, solver, grid, guidance and level of samples, in words."""
    words = []
    if "step" in s:
        words.append(f"checkpoint {number(s['step'])}")
    if "ema" in s:
        words.append(f"weights {s['ema']}")
    for part in ("solver", "grid"):
        if part in s:
            rest = {k: v for k, v in s[part].items() if k not in ("name", "steps")}
            more = f" ({', '.join(f'{k} {v}' for k, v in rest.items())})" if rest else ""
            steps = f", {s[part]['steps']} steps" if "steps" in s[part] else ""
            words.append(f"{s[part].get('name')}{more}{steps}")
    if s.get("guidance"):
        words.append(f"guidance scale {s['guidance'].get('scale'):g}")
    if s.get("aug_level") is not None:
        words.append(f"input augmented, level {s['aug_level']}")
    if s.get("truncate"):
        words.append("truncated")
    return words


def _commands(facts: Facts, words: Words) -> list[dict[str, str]]:
    """Label and text of each command."""
    workdir = shlex.quote(str(facts.workdir))
    commands = []
    argv = facts.run.get("argv") or []
    if argv[:1] == ["train"]:
        commands.append({"label": "train again", "text": shlex.join(["jdiff", *argv])})
    for label, name in (*words.commands, ("evaluate", "evaluate")):
        commands.append({"label": label, "text": f"jdiff {name} --workdir={workdir}"})
    commands.append({"label": "from Python", "text": words.python})
    return commands


def _environment(facts: Facts) -> list[tuple[str, str]]:
    run, rows = facts.run, []
    if run.get("devices"):
        rows.append(("devices", _device(facts)))
    if run.get("cpu_count"):
        rows.append(("CPU cores", str(run["cpu_count"])))
    speed = run.get("speed", {})
    if speed.get("flops"):
        rows.append(("operations a step", f"{speed['flops']:.4g}"))
        peak = speed.get("peak")
        unknown = "not known; config.train.peak_flops gives it"
        rows.append(("operations a second of a device", f"{peak:.4g} at best" if peak else unknown))
    if run.get("started"):
        rows.append(("started", _date(run["started"])))
    if seconds_of(facts) is not None:
        rows.append(("wall time", duration(seconds_of(facts))))
    rows += [(name, str(version)) for name, version in run.get("versions", {}).items()]
    rows.append(("run directory", str(facts.workdir)))
    return rows


def _date(started: Any) -> str:
    if not isinstance(started, int | float):
        return str(started)
    moment = datetime.datetime.fromtimestamp(started, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def seconds_of(facts: Facts) -> float | None:
    """The run's wall time; while it goes on, up to its last line."""
    known = facts.run.get("wall_seconds")
    if known is None and facts.lines:
        return facts.lines[-1].get("time")
    return known


def _device(facts: Facts) -> str:
    devices = facts.run.get("devices") or []
    devices = [" ".join(dict.fromkeys(str(device).split())) for device in devices]  # "cpu cpu"
    kinds = {kind: devices.count(kind) for kind in devices}
    return ", ".join(f"{n} × {kind}" if n > 1 else kind for kind, n in kinds.items())


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{number(count / 1e6)} M" if count >= 1e6 else number(count)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _value(value: Any) -> str:
    return "None" if value is None else str(value)
