"""The scales of MXFP8, which has E4M3 elements in blocks of 32 along a row, each with a scale that is a power of two.

Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.1 (MXFP8), 5.4.1 (E8M0 scales) and 6.3 (conversion). The
specification leaves the choice of the scale's exponent open; as ModelOpt does, it is rounded up, so that no element saturates.
"""

from __future__ import annotations

import torch

BLOCK = 32
_BIAS = 127
_FLOOR = -39
"""fp8.SCALE_FLOOR's exponent."""


def scales(weight: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes uint8 [out, in / 32] of the blocks of a float32 weight [out, in]."""
    return scale(torch.linalg.vector_norm(weight.unflatten(1, (-1, BLOCK)), float("inf"), dim=2))


def scale(amax: torch.Tensor) -> torch.Tensor:
    """The E8M0 byte for each magnitude `amax`, float32: that of the smallest 2 ** (byte - 127) >= amax / 448, from 2 ** -39 on.

    Exact: amax = m * 2 ** e with m in [0.5, 1), and 448 = 0.875 * 2 ** 9. A block of zeros has scale 1. Why there is a floor
    is at fp8.SCALE_FLOOR; E8M0's own, 2 ** -127, is no normal float32, and 0 to who makes one by shifting the byte.
    """
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).int()
    exponent = torch.where(amax == 0, 0, exponent.clamp(_FLOOR, _BIAS))
    return (exponent + _BIAS).to(torch.uint8)
