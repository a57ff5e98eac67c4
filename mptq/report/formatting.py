"""Human-readable numbers: bytes, counts, percentages, durations."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Formats a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def change(before: float, after: float) -> str:
    """Formats sizes in bytes before and after; a common unit is shown once."""
    (number_before, unit_before), unit_after = size(before).split(), size(after).split()[1]
    return f"{number_before if unit_before == unit_after else size(before)} → {size(after)}"


def number(count: float) -> str:
    """Formats a count, such as a number of parameters."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def percent(share: float, digits: int = 3) -> str:
    """Formats a fraction (0 to 1) as a percentage."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes and seconds, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def uncertain(mean: float, standard_error: float | None) -> str:
    """Formats a mean with its standard error, both to the second significant digit of the error."""
    if not standard_error:
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(standard_error)))
    return f"{mean:.{digits}f} ± {standard_error:.{digits}f}"
