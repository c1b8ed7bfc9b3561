"""Numbers and times as people read them."""

import math


def number(value: float | int | None, digits: int = 3) -> str:
    """A number with `digits` significant digits: 1,437, 0.0312, 2.5e-05; a dash for None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def signed(value: float | None) -> str:
    """A difference as `number`, with its sign: +1.20, −0.35, 0."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def percent(share: float | None) -> str:
    """A share as 97.3 %; 100 % only for all of it."""
    if share is None or math.isnan(share):
        return "–"
    shown = 99.9 if share < 1 and share > 0.9995 else 100 * share
    return f"{shown:.1f} %" if shown < 100 else "100 %"


def short(value: float) -> str:
    """A number for an axis: 0, 500, 1k, 2.5k, 3M, 0.01, 1e-5."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{letter}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds as 42 s, 3 min 20 s or 2 h 05 min."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
