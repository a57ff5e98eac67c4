"""Numbers for people: bytes, counts, shares, times."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """A number of bytes for people: decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def change(before: float, after: float) -> str:
    """Bytes before and after; the unit stands once where it is the same."""
    (number_before, unit_before), unit_after = size(before).split(), size(after).split()[1]
    return f"{number_before if unit_before == unit_after else size(before)} → {size(after)}"


def number(count: float) -> str:
    """A number of parameters for people."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def percent(share: float, digits: int = 3) -> str:
    """A share (0..1) in percent."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """A time for people: seconds, then minutes and seconds, then hours and minutes."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def uncertain(mean: float, standard_error: float | None) -> str:
    """A mean with its standard error, both to the error's second digit."""
    if not standard_error:
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(standard_error)))
    return f"{mean:.{digits}f} ± {standard_error:.{digits}f}"
