"""Compiled CPU loops over the elements of a strip: largest magnitudes, and FP8 bytes with their error.

Torch's operators pass over memory a dozen times for the same result and take three times as long. The arithmetic is
IEEE float32; only the float64 sums are reordered. tests/unit/quantize/test_quantizer.py checks it bit for bit.

A strip is an array of the bits of bfloat16 (int16) or float32 (int32). A cell is a block of `height` rows and `width`
columns (fewer at the ends) with its own magnitude and scale. Rounding is to nearest, ties to even, as in E4M3 of the
OCP 8-bit floating point specification 1.0 and in torch (c10/util/Float8_e4m3fn.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit

from mptq.quantize.error_statistics import Sums

_RUN = 512
"""Columns processed at once: their intermediate values fit in the L1 cache."""
_MAGNITUDE = np.int32(0x7FFFFFFF)
_SIGN_OF_CODE = np.int32(0x80)
_NORMAL = np.int32((127 - 6) << 23)
"""The bits of 2 ** -6, the smallest normal number of E4M3."""
_SUBNORMALS = np.float32(1 << 14)
"""Adding this to a number below _NORMAL rounds it to a multiple of 2 ** -9, the subnormal step, in the lowest bits."""
_SUBNORMALS_BITS = np.int32((127 + 14) << 23)
_BIAS = np.int32((127 - 7) << 3)
_DROPPED = np.int32(20)
"""Bits of float32's mantissa that E4M3 drops."""
_HALF = np.int32((1 << 19) - 1)
_KEPT = np.int32(-1 << 20)
_LARGEST_BITS = np.float32(448).view(np.int32)
"""Larger values saturate: those beyond the amax of the scale."""
_UNSIGNED, _ZERO, _LARGEST = np.uint8(0x7F), np.uint8(0), np.uint8(0x7E)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function on its first call, and caches the machine code in a file for later processes."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # neither the package nor the home directory is writable: each process compiles again
            compiled = njit(nogil=True, error_model="numpy", **options)(function)
        return compiled

    return decorate


@_compiled()
def _raise(largest: Any, bits: Any, mask: Any) -> None:
    """Updates `largest` with the magnitudes of `bits`, which order as integers like floats, with NaN above infinity."""
    for place in range(bits.size):
        largest[place] = max(largest[place], bits[place] & mask)


@_compiled()
def _largest(bits: Any) -> Any:
    largest = np.int32(0)
    for place in range(bits.size):
        largest = max(largest, np.int32(bits[place]))
    return largest


@_compiled()
def _magnitudes(source: Any, height: int, width: int, found: Any) -> None:
    rows, columns = source.shape
    shift = np.int32(32 - 8 * source.itemsize)
    mask = source.dtype.type(_MAGNITUDE >> shift)
    largest = np.empty(_RUN, source.dtype)
    for top in range(0, rows, height):
        for first in range(0, columns, _RUN):
            run = largest[: min(_RUN, columns - first)]
            run[:] = 0
            for row in range(top, min(top + height, rows)):
                _raise(run, source[row, first : first + _RUN], mask)
            for cell in range(first // width, (first + run.size - 1) // width + 1):
                part = run[max(cell * width - first, 0) : (cell + 1) * width - first]
                found[top // height, cell] = max(found[top // height, cell], np.int32(_largest(part) << shift))


@_compiled()
def _spread(scales: Any, first: int, width: int, scale: Any) -> None:
    """Fills `scale` with the scales of the columns from `first` on."""
    for cell in range(first // width, (first + scale.size - 1) // width + 1):
        scale[max(cell * width - first, 0) : (cell + 1) * width - first] = scales[cell]


@_compiled()
def _widen(bits: Any, values: Any) -> None:
    shift = np.int32(32 - 8 * bits.itemsize)
    for place in range(bits.size):
        values[place] = np.int32(np.int32(bits[place]) << shift).view(np.float32)


@_compiled()
def _round(values: Any, scale: Any, codes: Any, errors: Any) -> None:
    """Rounds values / scale to E4M3 `codes`; `errors` are dequantized minus original magnitudes."""
    for place in range(values.size):
        bits = np.float32(values[place] / scale[place]).view(np.int32)
        bits_of_magnitude = min(np.int32(bits & _MAGNITUDE), _LARGEST_BITS)
        small = bits_of_magnitude < _NORMAL
        shifted = np.float32(np.int32(bits_of_magnitude).view(np.float32) + _SUBNORMALS)
        odd = np.int32(np.int32(bits_of_magnitude >> _DROPPED) & np.int32(1))
        rounded = np.int32(bits_of_magnitude + np.int32(_HALF + odd))
        normal = np.int32(np.int32(rounded >> _DROPPED) - _BIAS)
        code = np.int32(np.float32(shifted).view(np.int32) - _SUBNORMALS_BITS) if small else normal
        value = np.float32(shifted - _SUBNORMALS) if small else np.int32(rounded & _KEPT).view(np.float32)
        magnitude = np.int32(np.float32(values[place]).view(np.int32) & _MAGNITUDE).view(np.float32)
        codes[place] = np.uint8(code | np.int32(np.int32(bits >> np.int32(24)) & _SIGN_OF_CODE))
        errors[place] = np.float32(np.float32(value * scale[place]) - magnitude)


# The order of sums does not matter, so the compiler may vectorize them.
@_compiled(fastmath={"reassoc"})
def _sums(values: Any, errors: Any, codes: Any) -> Any:
    """Sums of squared errors and values; bits of the largest error; numbers of zeros and of largest codes."""
    noise = signal = 0.0
    worst, zeros, saturated = np.int32(0), np.int32(0), np.int32(0)
    for place in range(values.size):
        error, value = np.float64(errors[place]), np.float64(values[place])
        noise += error * error
        signal += value * value
    for place in range(values.size):
        worst = max(worst, np.int32(np.float32(errors[place]).view(np.int32) & _MAGNITUDE))
    for place in range(values.size):
        code = np.uint8(codes[place] & _UNSIGNED)
        zeros += np.int32(code == _ZERO)
        saturated += np.int32(code == _LARGEST)
    return noise, signal, worst, zeros, saturated


@_compiled()
def _cast(source: Any, scales: Any, height: int, width: int, codes: Any) -> Any:
    rows, columns = source.shape
    values, scale, errors = (np.empty(_RUN, np.float32), np.empty(_RUN, np.float32), np.empty(_RUN, np.float32))
    noise = signal = 0.0
    worst, zeros, saturated = np.int32(0), 0, 0
    for row in range(rows):
        for first in range(0, columns, _RUN):
            run = slice(0, min(_RUN, columns - first))
            stored = codes[row, first : first + _RUN]
            _spread(scales[row // height], first, width, scale[run])
            _widen(source[row, first : first + _RUN], values[run])
            _round(values[run], scale[run], stored, errors[run])
            more = _sums(values[run], errors[run], stored)
            noise += more[0]
            signal += more[1]
            worst = max(worst, more[2])
            zeros += more[3]
            saturated += more[4]
    return noise, signal, np.int32(worst).view(np.float32), zeros, saturated


def _bits(strip: torch.Tensor) -> Any:
    """Returns the bits of a strip; bfloat16 and float32 are not copied, float16 is widened to float32."""
    if strip.dtype == torch.bfloat16:
        return strip.view(torch.int16).numpy()
    return strip.float().view(torch.int32).numpy()


def magnitudes(strip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns the amax of each cell of `strip` [rows, columns]: float32 [rows / height, columns / width] rounded up."""
    rows, columns = strip.shape
    found = torch.zeros(-(-rows // height), -(-columns // width), dtype=torch.int32)
    _magnitudes(_bits(strip), height, width, found.numpy())
    return found.view(torch.float32)


def cast(strip: torch.Tensor, scale: torch.Tensor, cell: tuple[int, int], out: torch.Tensor) -> Sums:
    """Fills `out` with `strip` divided by the float32 `scale` of each cell, as E4M3; returns error statistics."""
    return Sums(*_cast(_bits(strip), scale.numpy(), *cell, out.view(torch.uint8).numpy()))
