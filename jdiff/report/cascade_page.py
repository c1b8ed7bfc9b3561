"""The report of a cascade: every stage's pictures, figures and training on one page."""

import json
import os
import pathlib
import shlex
from typing import Any

from jdiff.report import charts, files
from jdiff.report.cascade_facts import CascadeFacts, StageFacts, gather_cascade
from jdiff.report.figures import duration, number, percent, signed
from jdiff.report.page import fill, millions, pairs, sampled, seconds_of

_STATES = {"running": "training"}
_SHARES = ("accuracy",)
_SHOTS = {"input": "Input, enlarged", "sample": "Sample", "truth": "Truth"}


def write_cascade(
    folder: str | pathlib.Path, out: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Writes the report of a cascade; returns its path, FOLDER/report.html unless `out` is given.

    Raises:
      UserError: `folder` is no cascade, or the file cannot be written.
    """
    path = pathlib.Path(out) if out else pathlib.Path(folder) / "report.html"
    return files.save(path, render_cascade(gather_cascade(folder), path.parent))


def render_cascade(facts: CascadeFacts, beside: pathlib.Path) -> str:
    """The page as one HTML text, which needs no other file and no network.

    Args:
      beside: the folder in which it is to lie, for links to the reports of the stages.
    """
    return files.page(
        "cascade.html.j2", ("page.css", "sweep.css", "cascade.css"), ("page.js", "config.js"),
        title=facts.name or facts.folder.absolute().name,
        subtitle=_subtitle(facts),
        states=_states(facts),
        cards=_cards(facts),
        generated=[
            {"label": _label(s), "picture": s.shots["generated"]}
            for s in facts.stages if "generated" in s.shots
        ],
        training=[
            {"label": f"{_label(s)}, step {number(s.run.pictures[-1].step)}",
             "picture": s.run.pictures[-1]}
            for s in facts.stages if s.run is not None and s.run.pictures
        ],
        restored=[_restored(s) for s in facts.stages if "sample" in s.shots],
        evaluation=facts.evaluation and _evaluation(facts),
        stages=[_stage(facts, s, beside) for s in facts.stages],
        charts=files.svg([c for s in facts.stages for c in _chart(s)]),
        commands=_commands(facts),
        config=[(name, "None" if value is None else str(value)) for name, value in facts.config],
    )  # fmt: skip


def _states(facts: CascadeFacts) -> list[tuple[str, int]]:
    found = [_state(stage) for stage in facts.stages]
    return [(state, found.count(state)) for state in dict.fromkeys(found)]


def _state(stage: StageFacts) -> str:
    if stage.run is None:
        return "waiting"
    state = stage.run.run.get("state", "waiting")
    return _STATES.get(state, state)


def _size(stage: StageFacts) -> str:
    """`16 × 16`: as evaluated, or what its data have; `×2` if only the factor is known."""
    shape = (stage.measured or {}).get("shape")
    if shape is None and stage.run is not None and stage.config.get("data.crop") != "patch":
        shape = stage.run.run.get("data", {}).get("shape")
    if shape:
        return f"{shape[0]} × {shape[1]}"
    size, factor = stage.config.get("data.size"), stage.config.get("low_res.factor")
    if size and stage.config.get("data.crop") != "patch":
        return f"{size} × {size}"
    return f"× {factor:g}" if factor else ""


def _label(stage: StageFacts) -> str:
    return f"Stage {stage.number} · {_size(stage)}".rstrip(" ·")


def _subtitle(facts: CascadeFacts) -> str:
    base = facts.stages[0]
    words = [" → ".join(_size(stage) or "?" for stage in facts.stages)]
    words.append(base.config.get("data.name"))
    classes = base.run and base.run.run.get("data", {}).get("num_classes")
    if classes:
        words.append(f"{classes} classes")
    return " · ".join(word for word in words if word)


def _cards(facts: CascadeFacts) -> list[dict[str, str]]:
    """The figures at the top, of the last stage; of all stages what adds up."""
    cards = []
    add = lambda label, value, note="": cards.append({"label": label, "value": value, "note": note})
    last = facts.stages[-1].measured or {}
    split = (facts.evaluation or {}).get("settings", {}).get("floor", "real")
    for row in last.get("metrics", ()):
        if row["key"] == "frechet":
            add(row["name"], number(row["generated"]), f"{split} split {number(row['floor'])}")
            if row["gap"] is not None:
                add("Compounding error", signed(row["gap"]),
                    f"from true input {number(row['true'])}")  # fmt: skip
    for row in (last.get("pairs") or {}).get("rows", ()):
        if row["key"] == "psnr":
            add("PSNR", f"{number(row['value'])} dB",
                f"the enlarged input {number(row['enlarged'])} dB")  # fmt: skip
    begun = [stage.run for stage in facts.stages if stage.run is not None]
    counts = [run.run["parameters"] for run in begun if run.run.get("parameters")]
    if counts:
        add("Parameters", millions(sum(counts)), _of_all(len(counts), len(facts.stages)))
    seconds = [s for run in begun if (s := seconds_of(run)) is not None]
    if seconds:
        add("Wall time", duration(sum(seconds)), _of_all(len(seconds), len(facts.stages)))
    return cards


def _of_all(count: int, stages: int) -> str:
    return f"all {stages} stages" if count == stages else f"{count} of {stages} stages"


def _restored(stage: StageFacts) -> dict[str, Any]:
    shots = [{"label": label, "picture": stage.shots[name]}
             for name, label in _SHOTS.items() if name in stage.shots]  # fmt: skip
    return {"label": _label(stage), "shots": shots}


def _evaluation(facts: CascadeFacts) -> dict[str, Any]:
    """The table of figures, a block a stage, and how they were taken."""
    s = facts.evaluation["settings"]
    words = [f"{number(s['num'])} images a set",
             f"against {number(s['reference_images'])} {s['reference']} images",
             f"features: {s['features']}", f"seed {s['seed']}",
             duration(facts.evaluation["seconds"]["total"])]  # fmt: skip
    blocks = []
    for stage in facts.stages:
        if stage.measured is None:
            continue
        blocks.append({
            "label": _label(stage), "how": " · ".join(sampled(stage.measured["settings"])),
            "rows": [_row(row) for row in stage.measured["metrics"]],
            "pairs": pairs(stage.measured["pairs"]),
        })  # fmt: skip
    return {"settings": " · ".join(words), "floor": s["floor"], "blocks": blocks}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A figure for the template: its texts, and how far from noise (0) to real (100) it lies."""
    write = percent if row["key"] in _SHARES else number
    places = {place: row[place] for place in ("true", "generated", "floor", "ceiling")}
    at = {place: fill(row | {"value": row[place]}) for place in ("true", "generated")}
    worse = row["gap"] is not None and (row["gap"] > 0) == (row["better"] == "lower")
    gap = row["gap"]
    if row["key"] in _SHARES and gap is not None:
        text = f"{'+' if gap > 0 else '−' if gap < 0 else ''}{percent(abs(gap))}"
    else:
        text = signed(gap)
    return {
        "name": row["name"], "about": row["about"], "gap": text, "worse": worse and bool(gap),
        "at": at, **{place: {"text": write(v), "exact": repr(v)} for place, v in places.items()},
    }  # fmt: skip


def _stage(facts: CascadeFacts, stage: StageFacts, beside: pathlib.Path) -> dict[str, Any]:
    """A row of the table of stages."""
    c, run = stage.config, stage.run
    report = facts.folder / f"stage{stage.number}" / "report.html"
    link = pathlib.Path(os.path.relpath(report, beside)).as_posix() if report.is_file() else None
    steps, losses = run.series("loss") if run else ([], [])
    total = c.get("train.steps")
    done = steps[-1] if steps else 0
    parameters = run and run.run.get("parameters")
    augmentation = "–"
    if c.get("low_res.factor"):
        augmentation = c.get("low_res.augmentation.name", "none")
        level = c.get("sampling.aug_level")
        augmentation += f", level {level:g} in sampling" if isinstance(level, int | float) else ""
        augmentation += ", truncated" if c.get("sampling.truncate") else ""
    return {
        "number": stage.number, "name": c.get("name") or f"stage{stage.number}", "link": link,
        "size": _size(stage), "network": c.get("model.name"), "augmentation": augmentation,
        "parameters": millions(parameters) if parameters else "–", "state": _state(stage),
        "steps": f"{number(done)} of {number(total)}" if done < (total or 0) else number(done),
        "loss": number(charts.smooth(losses)[-1]) if losses else "–",
        "seconds": duration(seconds_of(run) if run else None),
    }  # fmt: skip


def _chart(stage: StageFacts) -> list[dict[str, Any]]:
    """The loss of a stage."""
    steps, losses = stage.run.series("loss") if stage.run else ([], [])
    if not steps:
        return []
    lines = [charts.Line("loss", steps, losses)]
    if len(steps) >= 8:
        lines = [charts.Line("each", steps, losses, "raw"),
                 charts.Line("smoothed", steps, charts.smooth(losses))]  # fmt: skip
    title = f"{_label(stage)}"
    svg = charts.line_chart(
        lines, title=f"loss of stage {stage.number} over steps", log=True, width=420, height=250
    )
    return [{"title": title, "note": "log scale" if min(losses) > 0 else "", "svg": svg}]


def _commands(facts: CascadeFacts) -> list[dict[str, str]]:
    folder = shlex.quote(str(facts.folder))
    commands = []
    add = lambda label, text: commands.append({"label": label, "text": text})
    for stage in facts.stages:
        argv = (stage.run.run.get("argv") if stage.run else None) or []
        if argv[:1] == ["train"]:
            kept = [word for word in argv if not word.startswith("--config.stage=")]
            add("train again", shlex.join(["jdiff", *kept]))
            break
    add("draw samples of all stages", f"jdiff sample --workdir={folder} --all_stages")
    add("evaluate", f"jdiff evaluate --workdir={folder}")
    base = facts.stages[0].run
    classes = base and base.run.get("data", {}).get("num_classes")
    cond = f'{{"label": jax.numpy.arange(64) % {classes}}}' if classes else "None"
    add(
        "from Python",
        "import jax, jdiff\n\n"
        f"opened = jdiff.load_cascade({json.dumps(str(facts.folder))})\n"
        "images = opened.cascade.sample(jax.random.key(0), num=64, intermediate=True,\n"
        f"                               cond={cond})",
    )
    return commands
