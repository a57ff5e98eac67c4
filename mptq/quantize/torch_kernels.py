"""The functions of cpu_kernels.py, with torch's operators, for any device."""

from __future__ import annotations

import math

import torch

from mptq.quantize.error_statistics import Sums
from mptq.quantize.fp8 import E4M3_MAX, LARGEST_CODE


def magnitudes(strip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns the amax of each cell of `strip` [rows, columns]: float32 [rows / height, columns / width] rounded up."""
    rows, columns = strip.shape
    whole = torch.nn.functional.pad(strip, (0, -columns % width, 0, -rows % height))
    cells = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    amax: torch.Tensor = torch.linalg.vector_norm(cells, math.inf, dim=(1, 3))
    return amax.float()


def cast(strip: torch.Tensor, scale: torch.Tensor, cell: tuple[int, int], out: torch.Tensor) -> Sums:
    """Fills `out` with `strip` divided by the float32 `scale` of each cell, as E4M3; returns error statistics."""
    (height, width), (rows, columns) = cell, strip.shape
    spread = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    source = strip.float()
    out.copy_((source / spread).clamp_(-E4M3_MAX, E4M3_MAX))
    error = (out.float() * spread).sub_(source)
    codes = out.view(torch.uint8) & 0x7F
    return Sums(
        noise=_squares(error),
        signal=_squares(source),
        worst=float(torch.linalg.vector_norm(error, math.inf)),
        zeros=int((codes == 0).sum()),
        saturated=int((codes == LARGEST_CODE).sum()),
    )


def _squares(values: torch.Tensor) -> float:
    """Returns the sum of squares in float64, which cannot overflow for float32 values."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64) ** 2)
