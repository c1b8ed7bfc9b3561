"""Sets of moments: sorted, disjoint (start, end) pairs, in whatever unit of time."""

from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(pairs: Iterable[tuple[float, float]]) -> Intervals:
    """The moments that lie in any of the pairs, which may overlap; pairs of no length go."""
    out: Intervals = []
    for start, end in sorted(pair for pair in pairs if pair[1] > pair[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def both(a: Intervals, b: Intervals) -> Intervals:
    """The moments in `a` and in `b`."""
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            out.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def without(a: Intervals, b: Intervals) -> Intervals:
    """The moments in `a` that are not in `b`."""
    if not a:
        return []
    ends = [point for pair in b for point in pair]
    outside = [a[0][0], *ends, a[-1][1]]
    return both(a, union(zip(outside[::2], outside[1::2])))


def total(a: Intervals) -> float:
    """Their length."""
    return sum(end - start for start, end in a)
