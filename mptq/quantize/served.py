"""What Blackwell's loaders make of blocks with float32 scales: they quantize them again, to power-of-two scales.

Source: vLLM's `requant_weight_ue8m0_inplace` (model_executor/layers/quantization/utils/fp8_utils.py), which calls
`per_block_cast_to_fp8` (utils/deep_gemm.py); SGLang does the same. Blocks whose scales are powers of two stay as they are.
"""

from __future__ import annotations

import math

import torch

from mptq.quantize.fp8 import E4M3_MAX, spread, strips
from mptq.recipes.schemes import STRIP_ROWS, Scheme
from mptq.types import Fp8Weight

_LEAST_AMAX = 1e-4
_SAMPLED = 8
"""One of this many rows is enough for the error."""


def served_scale(weight: Fp8Weight, scheme: Scheme) -> torch.Tensor:
    """Returns the power-of-two scales, float32 of the grid of blocks, that a loader gives a weight."""
    height, width = scheme.cell
    codes = weight.data.view(torch.uint8) & 0x7F  # magnitudes have the order of their bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % width, 0, -len(codes) % height))
    largest = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax((1, 3))
    amax = largest.view(torch.float8_e4m3fn).float().mul_(weight.scale).clamp_(min=_LEAST_AMAX)
    return torch.exp2(torch.ceil(torch.log2(amax / torch.full_like(amax, E4M3_MAX))))


def as_served(weight: Fp8Weight, scheme: Scheme) -> Fp8Weight:
    """Returns a weight of float32-scaled blocks as a loader quantizes it again."""
    made = Fp8Weight(torch.empty_like(weight.data), served_scale(weight, scheme))
    for rows, values, _ in strips(weight, scheme):
        made.data[rows] = (values / spread(made.scale, scheme, rows, values.shape[1])).to(torch.float8_e4m3fn)
    return made


def served_error(source: torch.Tensor, weight: Fp8Weight, scheme: Scheme) -> float:
    """Returns the error of a weight as it is served, relative to the norm of its `source`, by every eighth row."""
    noise = signal = 0.0
    scales = served_scale(weight, scheme)
    for start in range(0, len(source), STRIP_ROWS):
        part = slice(start, min(start + STRIP_ROWS, len(source)))
        before, after = (_sampled(spread(one, scheme, part, source.shape[1])) for one in (weight.scale, scales))
        original = source[part][::_SAMPLED].float()
        values = weight.data[part][::_SAMPLED].float() * before
        found = (values / after).to(torch.float8_e4m3fn).float().mul_(after)
        noise += float((found - original).square().sum(dtype=torch.float64))
        signal += float(original.square().sum(dtype=torch.float64))
    return math.sqrt(noise / signal) if signal else 0.0


def _sampled(scales: torch.Tensor) -> torch.Tensor:
    """Returns the scales of the sampled rows; those of a single row of blocks are one row already."""
    return scales if len(scales) == 1 else scales[::_SAMPLED]
