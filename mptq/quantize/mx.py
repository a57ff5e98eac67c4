"""MXFP8 without a GPU: E4M3 elements in blocks of 32 along a row, each with a scale that is a power of two.

Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.1 (MXFP8), 5.4.1 (E8M0 scales) and 6.3 (conversion). The
specification leaves the choice of the scale's exponent open; as ModelOpt does, it is rounded up, so that no element saturates.
"""

from __future__ import annotations

import torch

from mptq.types import Fp8Weight

BLOCK = 32
_BIAS = 127
_STRIP_ROWS = 128
"""Rows handled at once, so that temporaries stay in cache."""


def scales(weight: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes uint8 [out, in / 32] of a float32 weight [out, in]: the smallest 2 ** (byte - 127) >= amax / 448.

    Exact: amax = m * 2 ** e with m in [0.5, 1), and 448 = 0.875 * 2 ** 9. A block of zeros has scale 1.
    """
    amax = torch.linalg.vector_norm(weight.unflatten(1, (-1, BLOCK)), float("inf"), dim=2)
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).int()
    exponent = torch.where(amax == 0, 0, exponent.clamp(-_BIAS, _BIAS))
    return (exponent + _BIAS).to(torch.uint8)


def quantize(weight: torch.Tensor) -> Fp8Weight:
    """Round a float32 weight [out, in], `in` a multiple of 32, to MXFP8: to nearest, ties to even.

    The division by the scale is exact. Peak memory: the result and a strip of 128 rows.
    """
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    bytes_of_rows = []
    for start in range(0, weight.shape[0], _STRIP_ROWS):
        strip = weight[start : start + _STRIP_ROWS]
        found = scales(strip)
        factor = torch.exp2(_BIAS - found.float())
        data[start : start + _STRIP_ROWS] = (strip.unflatten(1, (-1, BLOCK)) * factor[..., None]).flatten(1)
        bytes_of_rows.append(found)
    return Fp8Weight(data, torch.cat(bytes_of_rows))
