"""The report of a sweep: one page and tables of numbers, from the runs of all its points."""

import csv
import io
import os
import pathlib
import shlex
from typing import Any

from jdiff.report import files, sweep_charts
from jdiff.report.figures import duration, number
from jdiff.report.seeds import Spread
from jdiff.report.sweep_facts import LOSS, SEED, Group, Row, SweepFacts, gather_sweep

_PICTURES = 24_000_000  # bytes of pictures that a page may have


def write_sweep(
    folder: str | pathlib.Path, out: str | pathlib.Path | None = None, metric: str | None = None
) -> list[pathlib.Path]:
    """Writes the report of a sweep; returns the paths of the page and the tables.

    The page is FOLDER/report.html unless `out` is given; report.csv beside it has a row a point,
    and report_seeds.csv, if there are seeds, a row a setting.

    Raises:
      UserError: `folder` is no sweep, has no such metric, or cannot be written.
    """
    facts = gather_sweep(folder, metric)
    page = pathlib.Path(out) if out else pathlib.Path(folder) / "report.html"
    texts = {page: render_sweep(facts, page.parent), page.with_suffix(".csv"): points_csv(facts)}
    if facts.seeded:
        texts[page.with_name(f"{page.stem}_seeds.csv")] = seeds_csv(facts)
    return [files.save(path, text) for path, text in texts.items()]


def points_csv(facts: SweepFacts) -> str:
    """A row a point: its name, state, fields, figures, speed and time."""
    fields = [*facts.fields, *([SEED] if facts.seeded else [])]
    head = ["point", "state", "step", "steps", *fields, *(m.key for m in facts.metrics),
            "images_per_s", "seconds", "best", "error"]  # fmt: skip
    best = facts.best
    rows = [
        [row.name, row.status.state, row.status.step, row.status.steps,
         *(row.overrides.get(name, "") for name in fields),
         *(row.figures.get(m.key, "") for m in facts.metrics),
         row.rate or "", row.status.seconds or "", int(row is best), row.status.error]
        for row in facts.rows
    ]  # fmt: skip
    return _csv([head, *rows])


def seeds_csv(facts: SweepFacts) -> str:
    """A row a setting, the best first: of each metric n, mean, deviation and 95 % interval."""
    parts = ("n", "mean", "deviation", "low", "high")
    head = [*facts.fields, "points", *(f"{m.key}_{part}" for m in facts.metrics for part in parts)]
    rows = []
    for group in facts.groups:
        figures: list[Any] = []
        for metric in facts.metrics:
            made = group.spreads.get(metric.key)
            figures += [""] * 5 if made is None else ["" if v is None else v for v in made]
        rows.append(
            [*(group.overrides.get(f, "") for f in facts.fields), len(group.rows), *figures]
        )
    return _csv([head, *rows])


def render_sweep(facts: SweepFacts, beside: pathlib.Path) -> str:
    """The page as one HTML text, which needs no other file and no network.

    Args:
      beside: the folder in which it is to lie, for links to the reports of the points.
    """
    colours = _colours(facts)
    pictures, left_out = _pictures(facts)
    return files.page(
        "sweep.html.j2", ("page.css", "sweep.css"), ("sweep.js", "config.js"),
        title=facts.folder.absolute().name,
        subtitle=_subtitle(facts),
        states=_states(facts),
        cards=_cards(facts),
        chosen=facts.chosen,
        fields=[(name, _short(name, facts.fields)) for name in facts.fields],
        seeded=facts.seeded,
        metrics=facts.metrics,
        groups=[_group(facts, group, colours, beside) for group in facts.groups],
        uneven=facts.uneven,
        charts=files.svg(_charts(facts, colours)),
        legend=[(_label(facts, g.overrides), colours[id(g)]) for g in _in_order(facts)],
        pictures=pictures,
        left_out=left_out,
        commands=_commands(facts),
        config=[(name, "None" if value is None else str(value)) for name, value in facts.common],
    )  # fmt: skip


def _states(facts: SweepFacts) -> list[tuple[str, int]]:
    found = [row.status.state for row in facts.rows]
    order = ("finished", "running", "queued", "waiting", "stopped", "failed")
    return [(state, found.count(state)) for state in order if state in found]


def _subtitle(facts: SweepFacts) -> str:
    count = len(facts.rows)
    words = [facts.source, f"{count} point{'s' * (count != 1)}"]
    if facts.seeded and len(facts.groups) < count:
        words.append(f"{len(facts.groups)} settings")
    if facts.fields:
        words.append("over " + ", ".join(facts.fields))
    return " · ".join(words)


def _cards(facts: SweepFacts) -> list[dict[str, str]]:
    """The figures at the top: label, value, and a word on it."""
    cards = []
    add = lambda label, value, note="": cards.append({"label": label, "value": value, "note": note})
    finished = sum(row.counts for row in facts.rows)
    others = ", ".join(f"{n} {state}" for state, n in _states(facts) if state != "finished")
    add("Finished", f"{finished} of {len(facts.rows)}", others)
    best, leader = facts.best, facts.groups[0] if facts.groups else None
    made = leader and leader.spreads.get(facts.chosen.key)
    if made is not None and made.n > 1:
        label = _label(facts, leader.overrides)
        add(f"Best setting, {facts.chosen.name}", _plus_minus(made), f"{label} (n = {made.n})")
    if best is not None:
        add(f"Best point, {facts.chosen.name}", number(best.figures[facts.chosen.key]), best.name)
    seconds = sum(row.status.seconds or 0 for row in facts.rows)
    if seconds:
        add("Time of all points", duration(seconds), "as if one after the other")
    return cards


def _group(
    facts: SweepFacts, group: Group, colours: dict[int, str], beside: pathlib.Path
) -> dict[str, Any]:
    """A setting for the template: its cells and those of its points."""
    single = len(group.rows) == 1
    states: dict[str, int] = {}
    for row in group.rows:
        states[row.status.state] = states.get(row.status.state, 0) + 1
    return {
        "label": _label(facts, group.overrides),
        "colour": colours[id(group)],
        "single": single,
        "n": made.n if (made := group.spreads.get(facts.chosen.key)) else 0,
        "best": group is facts.groups[0] and facts.chosen.key in group.spreads,
        "fields": [_cell(group.overrides.get(name)) for name in facts.fields],
        "state": ", ".join(f"{n} {state}" for state, n in states.items()),
        "figures": [_spread_cell(group.spreads.get(m.key)) for m in facts.metrics],
        "rows": [_point(facts, row, beside) for row in group.rows],
    }


def _point(facts: SweepFacts, row: Row, beside: pathlib.Path) -> dict[str, Any]:
    report, rate = facts.folder / row.name / "report.html", row.rate
    return {
        "name": row.name,
        "link": pathlib.Path(os.path.relpath(report, beside)).as_posix()
        if report.is_file() else None,
        "best": row is facts.best,
        "fields": [_cell(row.overrides.get(name)) for name in facts.fields],
        "seed": _cell(row.overrides.get(SEED)),
        "state": row.status.state,
        "doing": row.status.doing or row.status.state,
        "error": row.status.error,
        "step": row.status.step,
        "steps": row.status.steps,
        "figures": [
            {"sort": row.figures.get(m.key), "text": number(row.figures.get(m.key)),
             "partial": not row.counts}
            for m in facts.metrics
        ],
        "rate": {"sort": rate, "text": number(rate and round(rate))},
        "seconds": {"sort": row.status.seconds, "text": duration(row.status.seconds)},
    }  # fmt: skip


def _charts(facts: SweepFacts, colours: dict[int, str]) -> list[dict[str, Any]]:
    found = []
    name, key = facts.chosen.name, facts.chosen.key
    better = {"lower": "lower is better", "higher": "higher is better"}.get(facts.chosen.better, "")
    bars = [
        sweep_charts.Bar(
            _label(facts, group.overrides), colours[id(group)],
            [r.figures[key] for r in group.rows if r.counts and key in r.figures],
            group.spreads[key], group is facts.groups[0],
        )
        for group in facts.groups if key in group.spreads
    ]  # fmt: skip
    if len(bars) > 1 or any(bar.spread.n > 1 for bar in bars):
        note = f"{better}; dots are seeds, the bar their mean, the line its 95 % interval"
        svg = sweep_charts.by_setting(bars, name)
        found.append({"title": f"{name} by setting", "note": note if facts.seeded else better,
                      "svg": svg, "kind": "wide"})  # fmt: skip
    lines = [
        sweep_charts.Curve(row.name, colours[id(group)], *row.losses)
        for group in _in_order(facts) for row in group.rows if row.losses[0]
    ]  # fmt: skip
    if lines:
        svg = "".join(
            sweep_charts.curves(lines, width=w, height=h, style=style)
            for w, h, style in ((1080, 340, "on-wide"), (420, 280, "on-narrow"))
        )
        found.append({"title": "Loss", "note": "smoothed, over steps; all points",
                      "svg": svg, "kind": "wide overlays"})  # fmt: skip
    for field in facts.fields:
        dots = _dots(facts, field, colours)
        if len({dot.x for dot in dots}) > 1:
            title = f"{name} over {_short(field, facts.fields)}"
            svg = sweep_charts.by_field(dots, title)
            found.append({"title": title, "note": "", "svg": svg, "kind": "small"})
    return found


def _dots(facts: SweepFacts, field: str, colours: dict[int, str]) -> list[sweep_charts.Dot]:
    """The finished points by one field, if it holds numbers."""
    dots, tints = [], {}
    for group in _in_order(facts):
        value = group.overrides.get(field)
        if not sweep_charts.numeric(value):
            continue
        rest = repr(sorted((k, v) for k, v in group.overrides.items() if k != field))
        tints.setdefault(rest, colours[id(group)])
        dots += [
            sweep_charts.Dot(value, row.figures[facts.chosen.key], rest, tints[rest], row.name)
            for row in group.rows if row.counts and facts.chosen.key in row.figures
        ]  # fmt: skip
    return dots


def _pictures(facts: SweepFacts) -> tuple[list[dict[str, Any]], int]:
    """The last samples of each point, the best settings first, and how many are left out."""
    shown, size, left_out = [], 0, 0
    for group in facts.groups:
        for row in group.rows:
            if row.picture is None:
                continue
            size += len(row.picture.uri)
            if size > _PICTURES:
                left_out += 1
                continue
            value = row.figures.get(facts.chosen.key) if row.counts else None
            figure = f"{facts.chosen.name} {number(value)}" if value is not None else ""
            shown.append({"name": row.name, "picture": row.picture, "figure": figure,
                          "best": row is facts.best})  # fmt: skip
    return shown, left_out


def _commands(facts: SweepFacts) -> list[dict[str, str]]:
    folder = shlex.quote(str(facts.folder))
    commands = []
    add = lambda label, text: commands.append({"label": label, "text": text})
    if facts.command[:1] == ("sweep",):
        add("go on with this sweep", shlex.join(["jdiff", *facts.command]))
    add("this report by another figure", f"jdiff report --workdir={folder} --metric={LOSS}")
    if (best := facts.best) is not None:
        path = shlex.quote(str(facts.folder / best.name))
        add("draw from the best point", f"jdiff sample --workdir={path}")
    return commands


def _in_order(facts: SweepFacts) -> list[Group]:
    """The settings in the order of the sweep."""
    place = {row.name: i for i, row in enumerate(facts.rows)}
    return sorted(facts.groups, key=lambda group: min(place[row.name] for row in group.rows))


def _colours(facts: SweepFacts) -> dict[int, str]:
    """The colour of each setting, by its identity."""
    groups = _in_order(facts)
    return {id(g): sweep_charts.colour(i, len(groups)) for i, g in enumerate(groups)}


def _label(facts: SweepFacts, overrides: dict[str, Any]) -> str:
    """`learning_rate 0.001, width 64`."""
    parts = [f"{_short(n, facts.fields)} {_text(overrides[n])}" for n in facts.fields
             if n in overrides]  # fmt: skip
    return ", ".join(parts) or "the config itself"


def _short(field: str, fields: list[str]) -> str:
    last = field.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in fields) == 1
    return last if alone else field


def _cell(value: Any) -> dict[str, Any]:
    sort = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    return {"sort": sort, "text": "–" if value is None else _text(value)}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _spread_cell(made: Spread | None) -> dict[str, Any]:
    if made is None:
        return {"sort": None, "text": "–", "more": "", "title": ""}
    title = f"n = {made.n}"
    if made.deviation is not None:
        title = (f"n = {made.n}, mean {made.mean:.6g}, deviation {made.deviation:.3g}, 95 % "
                 f"interval {made.low:.6g} to {made.high:.6g}")  # fmt: skip
    more = "" if made.half is None else f"± {number(made.half, 2)}"
    return {"sort": made.mean, "text": number(made.mean), "more": more, "title": title}


def _plus_minus(made: Spread) -> str:
    return number(made.mean) + (f" ± {number(made.half, 2)}" if made.half is not None else "")


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
