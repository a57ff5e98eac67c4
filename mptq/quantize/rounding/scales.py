"""The scale of each cell with the least error of a linear's outputs, as far as the inputs are independent.

The error of output i is sum_j (W_ij - Q_ij) x_j; with independent inputs its mean square is sum_j (W_ij - Q_ij)^2 H_jj,
where H_jj is the mean square of input j (the diagonal weighting of AWQ's and of NVFP4's local-Hessian searches).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mptq.quantize.fp8 import E4M3_MAX, fitted, scale_of
from mptq.quantize.quantizer import each_strip
from mptq.recipes.algorithms import SEARCHED
from mptq.recipes.schemes import Scheme


def cells(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of a cell in a weight of `shape`."""
    height, width = (size or whole for size, whole in zip(scheme.cell, shape, strict=True))
    return height, width


def search(weights: Iterable[torch.Tensor], diagonal: torch.Tensor, scheme: Scheme, amax: torch.Tensor) -> torch.Tensor:
    """Returns the amax, float32 of the shape of the scales, with the least weighted error of all `weights` [out, in].

    `diagonal` float32 [in] are the weights of the columns, and `amax` the largest magnitudes of the cells. More than one
    weight needs a scheme with a single scale. Memory: a few strips.
    """
    assert not scheme.exponents, "the scales of MX follow from the weight"
    tried = torch.stack([fitted(amax * factor, scheme) for factor in SEARCHED])
    errors = sum(_errors(weight, diagonal, scheme, scale_of(tried)) for weight in weights)
    assert isinstance(errors, torch.Tensor)
    best: torch.Tensor = errors.argmin(0).reshape(amax.shape)
    return tried.gather(0, best[None].to(tried.device))[0]


def _errors(weight: torch.Tensor, diagonal: torch.Tensor, scheme: Scheme, scales: torch.Tensor) -> torch.Tensor:
    """Returns the weighted error of each cell with each candidate scale: float64 [candidates, cell rows, cell columns]."""
    height, width = cells(scheme, tuple(weight.shape))
    grid = (-(-len(weight) // height), -(-weight.shape[1] // width))
    scales = scales.reshape(len(scales), *grid).contiguous()

    def work(rows: slice, strip: torch.Tensor) -> torch.Tensor:
        # The cells of a scheme with a single scale span all strips.
        first = 0 if scheme.shared else rows.start // height
        mine = scales[:, first : first - (-len(strip) // height)].contiguous()
        return _strip_errors(strip.float().contiguous(), diagonal, mine, (height, width))

    parts = list(each_strip(weight, work))
    return torch.stack(parts).sum(0) if scheme.shared else torch.cat(parts, 1)


def _strip_errors(strip: torch.Tensor, diagonal: torch.Tensor, scales: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Returns the weighted error of each cell of a strip with each candidate scale."""
    if strip.device.type != "cpu":
        return errors_by_torch(strip, diagonal, scales, cell)
    from mptq.quantize.rounding import kernels

    found = torch.zeros(scales.shape, dtype=torch.float64)
    kernels.scale_errors(strip.numpy(), diagonal.numpy(), scales.numpy(), *cell, found.numpy())
    return found


def errors_by_torch(strip: torch.Tensor, diagonal: torch.Tensor, scales: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """The same as `kernels.scale_errors`, with torch's operators, for any device."""
    (height, width), (rows, columns) = cell, strip.shape
    found = []
    for grid in scales:
        scale = grid.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        error = (strip - nearest(strip, scale)).square_().mul_(diagonal)
        padded = torch.nn.functional.pad(error, (0, -columns % width, 0, -rows % height))
        found.append(padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3), dtype=torch.float64))
    return torch.stack(found)


def nearest(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the nearest multiples of `scale` by E4M3 numbers, float32."""
    return (values / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float().mul_(scale)
