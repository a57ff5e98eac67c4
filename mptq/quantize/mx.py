"""The scales of MXFP8: E4M3 elements in blocks of 32 along a row, each block with a power-of-two scale.

Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.1 (MXFP8), 5.4.1 (E8M0 scales) and 6.3 (conversion).
The specification leaves the choice of the scale's exponent open; like ModelOpt, mptq rounds it up, so that no element
saturates.
"""

from __future__ import annotations

import torch

BLOCK = 32
_BIAS = 127
_FLOOR = -39
"""fp8.SCALE_FLOOR's exponent."""


def scales(weight: torch.Tensor) -> torch.Tensor:
    """Returns the E8M0 bytes, uint8 [out, in / 32], of the blocks of a float32 weight [out, in]."""
    return scale(torch.linalg.vector_norm(weight.unflatten(1, (-1, BLOCK)), float("inf"), dim=2))


def scale(amax: torch.Tensor) -> torch.Tensor:
    """Returns the E8M0 byte of the smallest 2 ** (byte - 127) >= amax / 448, at least 2 ** -39, for float32 `amax`.

    Exact, because amax = m * 2 ** e with m in [0.5, 1), and 448 = 0.875 * 2 ** 9. A block of zeros has scale 1. See
    fp8.SCALE_FLOOR for the reason of the floor. E8M0's own minimum, 2 ** -127, is subnormal in float32, and becomes 0
    where a float is made by shifting the byte into the exponent.
    """
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).int()
    exponent = torch.where(amax == 0, 0, exponent.clamp(_FLOOR, _BIAS))
    return (exponent + _BIAS).to(torch.uint8)
