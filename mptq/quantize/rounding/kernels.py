"""Compiled CPU loops of rounding: errors of candidate scales, and the two sequential passes over a block of columns.

Arrays are float32. Rounding is that of quantize/cpu_kernels.py: to E4M3, to nearest, ties to even, saturating.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mptq.quantize.cpu_kernels import _DROPPED, _HALF, _KEPT, _MAGNITUDE, _RUN, _SUBNORMALS, _compiled, _round, _spread

_SIGN = np.int32(-0x80000000)
_SMALLEST_NORMAL = np.float32(2.0**-6)
_LARGEST = np.float32(448)


@_compiled()
def _nearest(value: Any, scale: Any) -> Any:
    """Returns the multiple of `scale` by an E4M3 number that is nearest to `value`."""
    bits = np.float32(value / scale).view(np.int32)
    magnitude = np.int32(bits & _MAGNITUDE).view(np.float32)
    if magnitude < _SMALLEST_NORMAL:
        rounded = np.float32(np.float32(magnitude + _SUBNORMALS) - _SUBNORMALS)
    else:
        whole = np.int32(bits & _MAGNITUDE)
        odd = np.int32(np.int32(whole >> _DROPPED) & np.int32(1))
        up = np.int32(whole + np.int32(_HALF + odd))
        rounded = min(np.int32(up & _KEPT).view(np.float32), _LARGEST)
    signed = np.int32(np.float32(rounded).view(np.int32) | np.int32(bits & _SIGN)).view(np.float32)
    return np.float32(signed * scale)


@_compiled(fastmath={"reassoc"})
def _weighted(errors: Any, weights: Any) -> Any:
    total = np.float32(0)
    for place in range(errors.size):
        total += np.float32(weights[place] * np.float32(errors[place] * errors[place]))
    return total


@_compiled()
def scale_errors(source: Any, weights: Any, scales: Any, height: int, width: int, found: Any) -> None:
    """Adds to `found` float64 [candidates, cells...] each cell's error with each candidate scale, weighted by column."""
    rows, columns = source.shape
    scale, errors, codes = np.empty(_RUN, np.float32), np.empty(_RUN, np.float32), np.empty(_RUN, np.uint8)
    for row in range(rows):
        for first in range(0, columns, _RUN):
            count = min(_RUN, columns - first)
            values = source[row, first : first + count]
            for candidate in range(len(scales)):
                _spread(scales[candidate, row // height], first, width, scale[:count])
                _round(values, scale[:count], codes[:count], errors[:count])
                for cell in range(first // width, (first + count - 1) // width + 1):
                    part = slice(max(cell * width - first, 0), min((cell + 1) * width - first, count))
                    more = _weighted(errors[part], weights[first + part.start : first + part.stop])
                    found[candidate, row // height, cell] += more


@_compiled()
def feed_forward(wanted: Any, follows: Any, scale: Any, target: Any, error: Any) -> None:
    """Rounds the columns of a block in order; each error is fed to the columns after it, in proportion to `follows`.

    `wanted` [rows, block], overwritten, is the target with the errors of all earlier blocks; `follows` [block, block] is
    unit upper triangular. Fills `error` with target minus rounded.
    """
    rows, count = wanted.shape
    for row in range(rows):
        for column in range(count):
            missed = np.float32(target[row, column] - _nearest(wanted[row, column], scale[row, column]))
            error[row, column] = missed
            for later in range(column + 1, count):
                wanted[row, later] += np.float32(missed * follows[column, later])


@_compiled()
def descend(gradient: Any, curvature: Any, scale: Any, rounded: Any) -> None:
    """Rounds each column of a block to its best value given all others, in order; updates `rounded` in place.

    `gradient` [rows, block], overwritten, is error @ curvature of all columns; `curvature` [block, block] that in the
    block.
    """
    rows, count = gradient.shape
    for row in range(rows):
        for column in range(count):
            before = rounded[row, column]
            after = _nearest(np.float32(before + gradient[row, column] / curvature[column, column]), scale[row, column])
            if after != before:
                rounded[row, column] = after
                moved = np.float32(before - after)
                for later in range(column + 1, count):
                    gradient[row, later] += np.float32(moved * curvature[column, later])
