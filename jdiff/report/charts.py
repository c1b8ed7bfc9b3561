"""Line charts as SVG: colours come from the page's style, so they follow light and dark mode."""

import dataclasses
import html
import json
import math
from collections.abc import Callable, Sequence

from jdiff.report.figures import short

_MAX_POINTS = 600  # drawn for a line; more is not seen
#: Room around the area of a chart.
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 28


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart; `kind` is its class in the style: "main" or "raw"."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "main"


def line_chart(
    lines: Sequence[Line], *, title: str, log: bool = False, zero: bool = False,
    width: int = 640, height: int = 260, style: str = "",
) -> str:  # fmt: skip
    """An SVG element with axes, and the points of the last line for the page's pointer.

    Args:
      lines: drawn in order; the last is the one that the pointer reads. At least one has a point.
      title: what it shows, for readers that do not see.
      log: a logarithmic y axis, if all values are positive.
      zero: the y axis begins at zero.
      width, height: in user units; the page scales them.
      style: a class of the element.
    """
    lines = [line for line in lines if len(line.xs)]
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys]
    log = log and min(ys) > 0
    start = 0 if 0 < min(xs) < 0.1 * max(xs) else min(xs)
    x_ticks = linear_ticks(start, max(xs), max(3, width // 120))
    y_ticks = (
        log_ticks(min(ys), max(ys))
        if log
        else linear_ticks(0 if zero else min(ys), max(ys), cover=True)
    )
    to_x = scale(start, max(xs), LEFT, width - RIGHT, log=False)
    low, high = min([*y_ticks, *ys]), max([*y_ticks, *ys])
    to_y = scale(low, high, height - BOTTOM, TOP, log=log)

    parts = axes(to_x, x_ticks, to_y, y_ticks, width, height)
    for line in lines:
        points = [(to_x(x), to_y(y)) for x, y in thin(line.xs, line.ys)]
        if len(points) == 1:
            parts.append(f'<circle class="{line.kind}" cx="{points[0][0]:.1f}" '
                         f'cy="{points[0][1]:.1f}" r="3.5"/>')  # fmt: skip
        else:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path class="{line.kind}" d="{path}"/>')
    read = [
        [round(to_x(x), 1), round(to_y(y), 1), x, float(f"{y:.4g}")]
        for x, y in thin(lines[-1].xs, lines[-1].ys)
    ]
    return (
        f'<svg class="chart {style}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}" data-points="{json.dumps(read)}">'
        f"{''.join(parts)}</svg>"
    )


def smooth(ys: Sequence[float], share: float = 0.02) -> list[float]:
    """An exponential average over `share` of the points, without the pull of its start to zero."""
    window = max(1.0, share * len(ys))
    decay = 1.0 - 1.0 / window
    total, weight, out = 0.0, 0.0, []
    for y in ys:
        total = decay * total + (1.0 - decay) * y
        weight = decay * weight + (1.0 - decay)
        out.append(total / weight)
    return out


def thin(xs: Sequence[float], ys: Sequence[float], most: int = _MAX_POINTS) -> list[tuple]:
    """At most `most` of the points, evenly, with both ends."""
    count = len(xs)
    if count <= most:
        return list(zip(xs, ys))
    picked = sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
    return [(xs[i], ys[i]) for i in picked]


def linear_ticks(low: float, high: float, about: int = 4, cover: bool = False) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart.

    With `cover`, they reach beyond the ends where these are not round.
    """
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    outward = (math.floor, math.ceil) if cover else (math.ceil, math.floor)
    slack = 1e-9 if cover else -1e-9
    first, last = outward[0](low / step + slack), outward[1](high / step - slack)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few; plain steps in a narrow range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [f * 10.0**p for p in powers for f in factors]
        ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: max(1, len(ticks) // 6)]
    return linear_ticks(low, high)


def axes(
    to_x: Callable, x_ticks: Sequence[float], to_y: Callable, y_ticks: Sequence[float],
    width: int, height: int,
) -> list[str]:  # fmt: skip
    """A line across for each tick of y, and the numbers of both axes, as SVG elements."""
    parts = []
    for y in y_ticks:
        at = to_y(y)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{at:.1f}" dy="0.34em" text-anchor="end">'
            f"{short(y)}</text>"
        )
    for x in x_ticks:
        parts.append(
            f'<text class="tick" x="{to_x(x):.1f}" y="{height - 8}" text-anchor="middle">'
            f"{short(x)}</text>"
        )
    return parts


def scale(low: float, high: float, start: float, end: float, log: bool) -> Callable:
    """The map of [low, high] to [start, end]; one value lies in the middle."""
    if not high > low:
        return lambda value: (start + end) / 2
    if log:
        low, high = math.log(low), math.log(high)
        return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)
    return lambda value: start + (value - low) / (high - low) * (end - start)
