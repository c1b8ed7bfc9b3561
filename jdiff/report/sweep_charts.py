"""Charts of a sweep as SVG: loss curves over each other, a figure by setting, and by each field."""

import html
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jdiff.report import charts
from jdiff.report.figures import number
from jdiff.report.seeds import Spread

#: Colours of the style that tell settings apart; of more settings, a ramp is used.
COLOURS = 8
_ROW = 28  # height of a setting in the chart by setting
_MOST = 40  # settings drawn there


class Curve(NamedTuple):
    """A point's loss over steps."""

    name: str
    colour: str
    xs: Sequence[float]
    ys: Sequence[float]


class Bar(NamedTuple):
    """A setting: the figures of its points, their spread, and whether it is the best."""

    label: str
    colour: str
    values: Sequence[float]
    spread: Spread
    best: bool


class Dot(NamedTuple):
    """A point in the chart by a field; dots of one `line` are joined at their means."""

    x: float
    y: float
    line: str
    colour: str
    label: str


def colour(i: int, total: int) -> str:
    """The CSS colour of setting i, in the order of the sweep."""
    if total <= COLOURS:
        return f"var(--c{i})"
    share = round(100 * i / (total - 1))
    return f"color-mix(in oklab, var(--ramp-to) {share}%, var(--ramp-from))"


def curves(lines: Sequence[Curve], *, width: int, height: int, style: str = "") -> str:
    """Loss curves over each other, smoothed; on a logarithmic axis if all are positive."""
    lines = [line._replace(ys=charts.smooth(line.ys)) for line in lines if line.xs]
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys]
    log = min(ys) > 0
    start = 0 if 0 < min(xs) < 0.1 * max(xs) else min(xs)
    x_ticks = charts.linear_ticks(start, max(xs), max(3, width // 120))
    y_ticks = charts.log_ticks(min(ys), max(ys)) if log else charts.linear_ticks(min(ys), max(ys))
    to_x = charts.scale(start, max(xs), charts.LEFT, width - charts.RIGHT, log=False)
    low, high = min([*y_ticks, *ys]), max([*y_ticks, *ys])
    to_y = charts.scale(low, high, height - charts.BOTTOM, charts.TOP, log=log)
    parts = charts.axes(to_x, x_ticks, to_y, y_ticks, width, height)
    read = []
    for line in lines:
        points = charts.thin(line.xs, line.ys, 300)
        placed = [(round(to_x(x), 1), round(to_y(y), 1)) for x, y in points]
        name = html.escape(line.name, quote=True)
        if len(placed) == 1:
            parts.append(f'<circle class="curve" data-point="{name}" cx="{placed[0][0]}" '
                         f'cy="{placed[0][1]}" r="3.5" style="fill:{line.colour}"/>')  # fmt: skip
        else:
            path = "M" + "L".join(f"{x} {y}" for x, y in placed)
            parts.append(
                f'<path class="curve" data-point="{name}" style="stroke:{line.colour}" d="{path}"/>'
            )
        read.append([line.name, [[*at, x, float(f"{y:.4g}")]
                                 for at, (x, y) in zip(placed, points)]])  # fmt: skip
    data = html.escape(json.dumps(read), quote=True)
    return (
        f'<svg class="chart overlay {style}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Loss of every point over steps" data-curves="{data}">{"".join(parts)}</svg>'
    )


def by_setting(bars: Sequence[Bar], metric: str, *, width: int = 1080) -> str:
    """A line a setting: a dot for each seed, the mean, and its interval."""
    bars = bars[:_MOST]
    left = 24 + min(420, max(7.2 * len(bar.label) for bar in bars))
    values = [v for bar in bars for v in _reach(bar)]
    log = min(values) > 0 and max(values) / min(values) > 20
    ticks = (charts.log_ticks if log else charts.linear_ticks)(min(values), max(values))
    low, high = min([*ticks, *values]), max([*ticks, *values])
    height = _ROW * len(bars) + 34
    to_x = charts.scale(low, high, left, width - 24, log=log)
    parts = []
    for tick in ticks:
        at = to_x(tick)
        parts.append(
            f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{height - 28}"/>'
            f'<text class="tick" x="{at:.1f}" y="{height - 10}" text-anchor="middle">'
            f"{charts.short(tick)}</text>"
        )
    for i, bar in enumerate(bars):
        y = 4 + _ROW * (i + 0.5)
        kind = "setting best" if bar.best else "setting"
        parts.append(f'<g class="{kind}" style="--own:{bar.colour}"><title>{_told(bar, metric)}'
                     f'</title><text class="name" x="{left - 16:.0f}" y="{y:.1f}" dy="0.34em" '
                     f'text-anchor="end">{html.escape(bar.label)}</text>')  # fmt: skip
        if bar.spread.low is not None:
            ends = [max(min(to_x(v) if not log or v > 0 else left, width - 12.0), left - 8.0)
                    for v in (bar.spread.low, bar.spread.high)]  # fmt: skip
            parts.append(f'<line class="interval" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" '
                         f'y1="{y:.1f}" y2="{y:.1f}"/>')  # fmt: skip
        parts += [f'<circle class="seed" cx="{to_x(v):.1f}" cy="{y:.1f}" r="3.5"/>'
                  for v in bar.values]  # fmt: skip
        at = to_x(bar.spread.mean)
        parts.append(f'<line class="mean" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 8:.1f}" '
                     f'y2="{y + 8:.1f}"/></g>')  # fmt: skip
    return (
        f'<svg class="chart settings" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(metric, quote=True)} by setting">{"".join(parts)}</svg>'
    )


def by_field(dots: Sequence[Dot], title: str, *, width: int = 420, height: int = 250) -> str:
    """A figure over the values of one field; points that differ in this field alone are joined."""
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    log_x = min(xs) > 0 and max(xs) / min(xs) >= 8
    log_y = min(ys) > 0 and max(ys) / min(ys) > 20
    x_ticks = sorted(set(xs)) if len(set(xs)) <= 6 else None
    if x_ticks is None:
        x_ticks = (charts.log_ticks if log_x else charts.linear_ticks)(min(xs), max(xs))
    y_ticks = (charts.log_ticks if log_y else charts.linear_ticks)(min(ys), max(ys))
    to_x = charts.scale(min(xs), max(xs), charts.LEFT + 14, width - charts.RIGHT - 14, log=log_x)
    low, high = min([*y_ticks, *ys]), max([*y_ticks, *ys])
    to_y = charts.scale(low, high, height - charts.BOTTOM, charts.TOP, log=log_y)
    parts = charts.axes(to_x, x_ticks, to_y, y_ticks, width, height)
    lines: dict[str, dict[float, list[float]]] = {}
    colours = {}
    for dot in dots:
        lines.setdefault(dot.line, {}).setdefault(dot.x, []).append(dot.y)
        colours.setdefault(dot.line, dot.colour)
    for line, found in lines.items():
        if len(found) > 1:
            means = [(to_x(x), to_y(sum(v) / len(v))) for x, v in sorted(found.items())]
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in means)
            own = colours[line] if len(lines) > 1 else "var(--accent)"
            parts.append(f'<path class="joined" style="stroke:{own}" d="{path}"/>')
    for dot in dots:
        own = dot.colour if len(lines) > 1 else "var(--accent)"
        parts.append(f'<circle class="seed" style="--own:{own}" cx="{to_x(dot.x):.1f}" '
                     f'cy="{to_y(dot.y):.1f}" r="4"><title>{html.escape(dot.label)}: '
                     f"{number(dot.y)}</title></circle>")  # fmt: skip
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg>'
    )


def _reach(bar: Bar) -> list[float]:
    """What the axis has to show of a setting: its points, and intervals that are not far wider.

    Two seeds have an interval that is thirteen deviations wide to each side; drawn whole it would
    press everything else together.
    """
    found = [*bar.values]
    if bar.spread.n > 2:
        found += [v for v in (bar.spread.low, bar.spread.high) if v > 0 or min(bar.values) <= 0]
    return [v for v in found if math.isfinite(v)]


def _told(bar: Bar, metric: str) -> str:
    s = bar.spread
    more = f", 95 % interval {number(s.low)} to {number(s.high)}" if s.low is not None else ""
    return html.escape(f"{bar.label}: {metric} {number(s.mean)} (n = {s.n}){more}")


def numeric(value: Any) -> bool:
    """Whether a field's value is a number that an axis can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
