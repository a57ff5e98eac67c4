"""Quantization in strips of rows that stay in cache: ModelOpt's numbers bit for bit, and their error, in one pass.

ModelOpt goes through whole matrices in float32, several times. Here a thread casts, scales and rounds a strip and compares it
with its source, always in the same few buffers, before it takes the next one.
Source of the arithmetic: modelopt/torch/quantization/qtensor/fp8_tensor.py; of MX: mx.py.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mptq.quantize import mx
from mptq.quantize.fp8 import E4M3_MAX, LARGEST_CODE, STRIP_ROWS, decode, powers_of_two, require_finite
from mptq.recipe import Scheme
from mptq.types import Fp8Weight, WeightError

_STRIP = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of a strip: enough to make up for the start of an operator, few enough for a CPU's cache."""


@dataclass(slots=True)
class _Sums:
    """What the strips of a weight add up to."""

    noise: float = 0.0
    signal: float = 0.0
    worst: float = 0.0
    amax: float = 0.0
    zeros: int = 0
    saturated: int = 0

    def add(self, other: _Sums) -> None:
        """Join what another strip has."""
        self.noise += other.noise
        self.signal += other.signal
        self.worst = max(self.worst, other.worst)
        self.amax = max(self.amax, other.amax)
        self.zeros += other.zeros
        self.saturated += other.saturated


def amax_of(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Largest magnitude of `weight` [out, in], float32 []; raises CheckpointError naming `name` where one is not finite."""
    low, high = torch.aminmax(weight)
    amax = torch.maximum(-low, high).float()
    if not torch.isfinite(amax):
        require_finite(weight, name)
    return amax


def quantize(
    weight: torch.Tensor, scheme: Scheme, name: str, amax: torch.Tensor | None = None
) -> tuple[Fp8Weight, WeightError]:
    """`weight` [out, in], of any float dtype, in FP8, and how far that is from it.

    `amax` is the magnitude that one scale a tensor is for, of all members of a fused group; its own where it is None.
    Raises CheckpointError naming `name` for a weight that is not finite. Peak memory: the result, and on a CPU 12 MB
    for each of up to 8 threads.
    """
    made = unfilled(weight, scheme)
    if scheme.scale == "tensor":
        _store(amax_of(weight, name) if amax is None else amax, made, ...)
    found = _Sums()
    cuts = list(_cuts(weight.shape, _STRIP[weight.device.type]))
    share = _pool().map if weight.device.type == "cpu" and len(cuts) > 1 else map
    for part in share(lambda rows: _strip(weight[rows], made, rows, _STEPS[scheme.scale]), cuts):
        found.add(part)
    if not math.isfinite(found.signal):
        require_finite(weight, name)
    return made, _error(made, scheme, found)


def unfilled(weight: torch.Tensor, scheme: Scheme) -> Fp8Weight:
    """The memory of what `weight` becomes."""
    grid, device = scheme.grid(*weight.shape), weight.device
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
    if scheme.scale == "mx":
        return Fp8Weight(data, torch.empty(grid, dtype=torch.uint8, device=device))
    return Fp8Weight(data, torch.empty(grid, device=device), torch.empty(grid, device=device))


def _store(amax: torch.Tensor, made: Fp8Weight, at: Any) -> torch.Tensor:
    """Store magnitudes and their scales, amax / 448, and 1 for all zeros (or what is so small that its scale would be 0)."""
    assert made.amax is not None
    made.amax[at] = torch.where(amax / E4M3_MAX == 0, E4M3_MAX, amax)
    made.scale[at] = made.amax[at] / E4M3_MAX
    return made.scale[at]


def _cuts(shape: torch.Size, elements: int) -> Iterator[slice]:
    """Rows of strips of about so many elements: whole blocks of 128 rows, and then what is left."""
    height = max(1, elements // (shape[1] * STRIP_ROWS)) * STRIP_ROWS
    whole = shape[0] - shape[0] % STRIP_ROWS
    for start in range(0, whole, height):
        yield slice(start, min(start + height, whole))
    if whole < shape[0]:
        yield slice(whole, shape[0])


def _block(strip: torch.Tensor, made: Fp8Weight, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    columns = strip.shape[2]
    amax = torch.nn.functional.pad(_magnitudes(strip, 1), (0, -columns % 128)).unflatten(1, (-1, 128)).amax(2)
    scale = _store(amax, made, slice(rows.start // 128, rows.start // 128 + len(strip)))
    return scale.repeat_interleave(128, dim=1)[:, None, :columns], amax


def _row(strip: torch.Tensor, made: Fp8Weight, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    amax = _magnitudes(strip, 2)
    return _store(amax.view(-1, 1), made, rows).view(*strip.shape[:2], 1), amax


def _tensor(strip: torch.Tensor, made: Fp8Weight, _rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    return made.scale, _magnitudes(strip, 1)


def _mx(strip: torch.Tensor, made: Fp8Weight, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    scale = made.scale[rows].copy_(mx.scales(strip.float().flatten(0, 1)))
    return powers_of_two(scale).repeat_interleave(mx.BLOCK, dim=1).view(strip.shape), _magnitudes(strip, 1)


_Step = Callable[[torch.Tensor, Fp8Weight, slice], tuple[torch.Tensor, torch.Tensor]]
_STEPS: dict[str, _Step] = {"block": _block, "row": _row, "tensor": _tensor, "mx": _mx}
"""Kind of scale -> finds those of a strip [blocks, 128, in] and stores them; what to divide it by, and magnitudes."""


def _magnitudes(strip: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest magnitude along a dimension, float32; of 16-bit numbers by their bits, which are in the order of magnitudes."""
    if strip.dtype.itemsize != 2:
        return strip.abs().amax(dim).float()
    return (strip.view(torch.int16) & 0x7FFF).amax(dim).view(strip.dtype).float()


_kept = threading.local()


def _buffers(like: torch.Tensor) -> list[torch.Tensor]:
    """What a strip is computed in, two of float32, one of int16, one of bytes, of its shape.

    A thread keeps them: memory that is given back and asked for again would be cleared every time.
    """
    kept = getattr(_kept, "buffers", None)
    if kept is None or kept[0].numel() < like.numel() or kept[0].device != like.device:
        kinds = (torch.float32, torch.float32, torch.int16, torch.uint8)
        kept = _kept.buffers = [torch.empty(like.numel(), dtype=kind, device=like.device) for kind in kinds]
    return [buffer[: like.numel()].view(like.shape) for buffer in kept]


@cache
def _pool() -> ThreadPoolExecutor:
    """A thread for each core, up to 8, that computes alone: torch's own would wait for each other after every operator.

    The processes that torchrun starts on a machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(max(1, min(8, cores)), "strips", initializer=lambda: torch.set_num_threads(1))


def _strip(strip: torch.Tensor, made: Fp8Weight, rows: slice, step: _Step) -> _Sums:
    """Quantize `strip`, the `rows` of a weight, into `made`."""
    blocks = strip.view(-1, min(STRIP_ROWS, len(strip)), strip.shape[1])
    source, other, bits, codes = _buffers(blocks)
    scale, amax = step(blocks, made, rows)
    data = made.data[rows].view(blocks.shape)
    data.copy_(torch.div(source.copy_(blocks), scale, out=other))
    difference = decode(data, other, bits).mul_(scale).sub_(source)
    torch.bitwise_and(data.view(torch.uint8), 0x7F, out=codes)
    low, high = torch.aminmax(difference)
    return _Sums(
        noise=_square(difference),
        signal=_square(source),
        worst=max(-float(low), float(high)),
        amax=float(amax.max()),
        zeros=strip.numel() - int(torch.count_nonzero(codes)),
        saturated=strip.numel() - int(torch.count_nonzero(codes.bitwise_xor_(LARGEST_CODE))),
    )


def _square(strip: torch.Tensor) -> float:
    """The sum of squares: of each row in float32, of the rows in float64, in which those of any float32 are finite."""
    rows = torch.linalg.vector_norm(strip, dim=-1).double()
    if not torch.isfinite(rows).all():
        rows = torch.linalg.vector_norm(strip.double(), dim=-1)
    return float(rows.square_().sum())


def _error(made: Fp8Weight, scheme: Scheme, found: _Sums) -> WeightError:
    ratio = found.noise / found.signal if found.signal else 0.0
    low, high = torch.aminmax(powers_of_two(made.scale) if scheme.scale == "mx" else made.scale)
    count = made.data.numel()
    return WeightError(
        relative=math.sqrt(ratio),
        sqnr_db=-10 * math.log10(ratio) if ratio else None,
        max_abs=found.worst,
        norm=math.sqrt(found.signal),
        amax=found.amax,
        scale_min=float(low),
        scale_max=float(high),
        zeros=found.zeros / count,
        saturated=found.saturated / count,
    )
