"""What a sweep's folder holds, read for its report: a row a point, and points of one setting."""

import dataclasses
import math
import pathlib
import statistics
from typing import Any

from jdiff.errors import UserError, choose
from jdiff.launching import array, folder
from jdiff.report import charts
from jdiff.report.facts import Picture, gather
from jdiff.report.seeds import Spread, spread

#: The field in which points of one setting differ.
SEED = "seed"
LOSS = "loss"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure that points are compared by; `better` is "lower", "higher" or "" for neither."""

    key: str
    name: str
    better: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A point: its status, figures by metric, loss over steps, and last picture."""

    name: str
    overrides: dict[str, Any]
    status: folder.Status
    figures: dict[str, float]
    losses: tuple[list[int], list[float]]
    picture: Picture | None
    settings: dict[str, Any]  # with which it was evaluated
    rate: float | None = None  # images a second, the median of its training

    @property
    def counts(self) -> bool:
        """Whether its figures may be compared: those of unfinished points are of fewer steps."""
        return self.status.state == "finished"


@dataclasses.dataclass(frozen=True)
class Group:
    """Points that differ by their seed alone."""

    overrides: dict[str, Any]
    rows: list[Row]
    spreads: dict[str, Spread]  # by metric, over the finished points


@dataclasses.dataclass(frozen=True)
class SweepFacts:
    """Everything that a sweep's report is made from.

    Attributes:
      fields: those that are not the same in all points, without the seed.
      seeded: whether the points have seeds.
      metrics: that at least one point has; the one that decides comes first, the loss last.
      chosen: the metric that decides.
      groups: the best first, those without a figure last.
      common: the config that all points share, (full name, value).
      uneven: how points were evaluated differently, a text for each setting.
    """

    folder: pathlib.Path
    source: str
    command: tuple[str, ...]
    fields: list[str]
    seeded: bool
    metrics: list[Metric]
    chosen: Metric
    rows: list[Row]
    groups: list[Group]
    common: list[tuple[str, Any]]
    uneven: list[str]

    @property
    def best(self) -> Row | None:
        """The finished point with the best figure of the chosen metric."""
        found = [row for row in self.rows if math.isfinite(self.order(row))]
        return min(found, key=self.order, default=None)

    def order(self, row: Row) -> float:
        """Smaller for better; the last for a point whose figure does not count."""
        value = row.figures.get(self.chosen.key) if row.counts else None
        return math.inf if value is None else self.rank(value)

    def rank(self, value: float) -> float:
        """Smaller for better, by the chosen metric."""
        return -value if self.chosen.better == "higher" else value


def gather_sweep(path: str | pathlib.Path, metric: str | None = None) -> SweepFacts:
    """Reads a sweep's folder.

    Args:
      metric: the key of the figure that decides; the Frechet distance unless given, or the first
        that there is.

    Raises:
      UserError: it is no sweep, a file is damaged, or no point has such a metric.
    """
    sweep = folder.read(path)
    states = folder.look(sweep, array.queue())
    known: dict[str, Metric] = {}
    rows = [_row(sweep, name, states[name], known) for name in sweep.points]
    known[LOSS] = known.pop(LOSS, Metric(LOSS, "Loss", "lower"))
    if metric is None:
        chosen = known["frechet" if "frechet" in known else next(iter(known))]
    else:
        chosen = known[choose("--metric", metric, known)]
    fields = _varying([row.overrides for row in rows])
    facts = SweepFacts(
        folder=sweep.folder, source=sweep.source, command=sweep.command,
        fields=[name for name in fields if name != SEED], seeded=SEED in fields,
        metrics=[chosen, *(m for m in known.values() if m != chosen)], chosen=chosen,
        rows=rows, groups=[], common=_common(sweep), uneven=_uneven(rows, fields),
    )  # fmt: skip
    return dataclasses.replace(facts, groups=_groups(facts))


def _row(sweep: folder.Sweep, name: str, status: folder.Status, known: dict[str, Metric]) -> Row:
    """Reads a point's run; its metrics are added to `known`."""
    path = sweep.folder / name
    if not (path / "config.json").is_file():
        return Row(name, sweep.points[name], status, {}, ([], []), None, {})
    try:
        facts = gather(path)
    except UserError as error:  # a damaged file of one point hides none of the others
        status = dataclasses.replace(status, state="failed", error=str(error))
        return Row(name, sweep.points[name], status, {}, ([], []), None, {})
    evaluation = facts.evaluation or {}
    figures: dict[str, float] = {}
    for metric in evaluation.get("metrics", []):
        if metric["value"] is not None:
            known.setdefault(
                metric["key"], Metric(metric["key"], metric["name"], metric.get("better", ""))
            )
            figures[metric["key"]] = metric["value"]
    if judged := evaluation.get("classifier"):
        known.setdefault("accuracy", Metric("accuracy", "Intended class found", "higher"))
        figures["accuracy"] = judged["accuracy"]
    steps, losses = facts.series("loss")
    if losses:
        figures[LOSS] = charts.smooth(losses)[-1]
    picture = facts.pictures[-1] if facts.pictures else None
    settings = evaluation.get("settings", {})
    _, rates = facts.series("images_per_s")
    rate = statistics.median(rates) if rates else None
    return Row(name, sweep.points[name], status, figures, (steps, losses), picture, settings, rate)


def _groups(facts: SweepFacts) -> list[Group]:
    """The settings with their points, the best first."""
    found: dict[str, list[Row]] = {}
    for row in facts.rows:
        rest = {name: value for name, value in row.overrides.items() if name != SEED}
        found.setdefault(repr(sorted(rest.items())), []).append(row)
    groups = []
    for rows in found.values():
        spreads = {}
        for metric in facts.metrics:
            values = [r.figures[metric.key] for r in rows if r.counts and metric.key in r.figures]
            if (made := spread(values)) is not None:
                spreads[metric.key] = made
        rest = {name: value for name, value in rows[0].overrides.items() if name != SEED}
        groups.append(Group(rest, rows, spreads))

    def order(group: Group) -> float:
        made = group.spreads.get(facts.chosen.key)
        return math.inf if made is None else facts.rank(made.mean)

    for group in groups:
        group.rows.sort(key=facts.order)
    return sorted(groups, key=order)


def _varying(points: list[dict[str, Any]]) -> list[str]:
    """The fields that are not the same in all points, in the order in which they appear."""
    names = dict.fromkeys(name for point in points for name in point)
    missing = object()
    return [
        name for name in names
        if any(point.get(name, missing) != points[0].get(name, missing) for point in points)
        or len(points) == 1
    ]  # fmt: skip


def _common(sweep: folder.Sweep) -> list[tuple[str, Any]]:
    """The fields that have one value in the configs of all points."""
    from jdiff.config import fields, from_json

    trees = []
    for name in sweep.points:
        path = sweep.folder / "points" / f"{name}.json"
        if path.is_file():
            trees.append(dict(fields(from_json(path.read_text()))))
    if not trees:
        return []
    missing = object()
    return [
        (name, value) for name, value in trees[0].items()
        if all(tree.get(name, missing) == value for tree in trees)
    ]  # fmt: skip


def _uneven(rows: list[Row], fields: list[str]) -> list[str]:
    """What was not the same when the points were evaluated, and is not what the sweep varies."""
    measured = [row for row in rows if row.counts and row.settings]
    names = dict.fromkeys(name for row in measured for name in row.settings)
    swept = {part for name in fields for part in name.split(".")}
    found = []
    for name in names:
        values = list(dict.fromkeys(repr(row.settings.get(name)) for row in measured))
        if len(values) > 1 and name not in swept:
            found.append(f"{name}: {', '.join(values[:4])}")
    return found
