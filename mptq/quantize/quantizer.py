"""Quantizes weights in strips of rows, with a thread per core. Matches ModelOpt bit for bit, and measures the error.

ModelOpt makes several passes over whole matrices in float32. Here each strip is read twice, once for amax and once for
everything else. Source of the arithmetic: modelopt/torch/quantization/qtensor/fp8_tensor.py; for MX: mx.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import accumulate
from threading import Thread
from types import ModuleType
from typing import Any

import torch

from mptq.errors import CheckpointError
from mptq.model.fused import Fusion
from mptq.quantize import mx
from mptq.quantize.error_statistics import Sums
from mptq.quantize.fp8 import floored, powers_of_two, scale_of
from mptq.recipes.schemes import STRIP_ROWS, Scheme
from mptq.types import Fp8Weight, WeightError

_STRIP = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements of a strip: enough to amortize the overhead, few enough for a CPU's cache and for temporaries on a GPU."""


def _arithmetic(device: torch.device) -> ModuleType:
    """Returns the module with the loops over elements: compiled for a CPU, torch operators for other devices."""
    if device.type == "cpu":
        from mptq.quantize import cpu_kernels

        return cpu_kernels
    from mptq.quantize import torch_kernels

    return torch_kernels


def amax_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the amax of `tensor` [any], float32 []; raises CheckpointError with `name` if a value is not finite."""
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    magnitudes, matrix = _arithmetic(tensor.device).magnitudes, tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
    amax = torch.stack(list(_each_strip([matrix], lambda _rows, strip: magnitudes(strip, *strip.shape)))).amax()
    if not torch.isfinite(amax):
        bad = torch.nonzero(~torch.isfinite(tensor))
        raise CheckpointError(
            f"{name} {list(tensor.shape)} has {len(bad)} values that are NaN or infinite, the first at {bad[0].tolist()}"
        )
    return amax


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises CheckpointError with `name` and the first position if `tensor` [any] has NaN or infinite values."""
    amax_of(tensor, name)


def quantize(
    weight: torch.Tensor | Sequence[torch.Tensor], scheme: Scheme, name: str, amax: torch.Tensor | None = None
) -> tuple[Fp8Weight, WeightError]:
    """Quantizes `weight` [out, in], of any float dtype, to FP8; returns the result and its error.

    The weight may be given as several pieces (views of rows of a larger matrix), concatenated along rows; all but the
    last must be whole cells. With one scale per tensor, `amax` is the magnitude to scale for, that of a fused group;
    None uses the weight's own. Raises CheckpointError with `name` for a weight that is not finite. Peak memory: the
    result, plus 4 MB per thread for float16, or 0.4 GB on a GPU.
    """
    pieces = [weight] if isinstance(weight, torch.Tensor) else weight
    made = unfilled(pieces, scheme)
    if scheme.shared:
        _store(torch.stack([amax_of(piece, name) for piece in pieces]).amax() if amax is None else amax, made, ...)
    sums, largest = Sums(), 0.0
    for more, magnitude in _each_strip(pieces, partial(_strip, made, scheme)):
        sums.add(more)
        largest = max(largest, magnitude)
    if not math.isfinite(sums.signal):
        require_finite(torch.cat(list(pieces)), name)
    return made, _error(made, scheme, sums, largest)


def unfilled(pieces: Sequence[torch.Tensor], scheme: Scheme) -> Fp8Weight:
    """Allocates, uninitialized, the quantized weight of `pieces`."""
    shape, device = (sum(len(piece) for piece in pieces), pieces[0].shape[1]), pieces[0].device
    grid = scheme.grid(*shape)
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if scheme.exponents:
        return Fp8Weight(data, torch.empty(grid, dtype=torch.uint8, device=device))
    return Fp8Weight(data, torch.empty(grid, device=device), torch.empty(grid, device=device))


def _store(amax: torch.Tensor, made: Fp8Weight, at: Any) -> torch.Tensor:
    """Stores `floored` amax, and returns and stores its scales, amax / 448. ModelOpt computes each from the other."""
    assert made.amax is not None
    made.amax[at] = floored(amax)
    made.scale[at] = scale_of(made.amax[at])
    return made.scale[at]


def in_place(fusion: Fusion, scheme: Scheme, weight: torch.Tensor) -> bool:
    """Whether the members' rows are quantized as views of the fused `weight`, where that is faster than copying them.

    No cell may span two members, and contiguous rows of a member must be enough for a strip.
    """
    if fusion.repeat == 1:
        return True
    large = min(fusion.widths) * weight.shape[1] >= _STRIP[weight.device.type] // 8
    return large and fusion.aligned(scheme.unit[0])


def _each_strip[Found](pieces: Sequence[torch.Tensor], work: Callable[[slice, torch.Tensor], Found]) -> Iterator[Found]:
    """Yields `work(rows, strip)` for the strips of all pieces, in order; on a CPU, strips are processed in parallel."""
    height = max(1, _STRIP[pieces[0].device.type] // (pieces[0].shape[1] * STRIP_ROWS)) * STRIP_ROWS
    strips = [strip for piece in pieces for strip in piece.split(height)]
    ends = list(accumulate(map(len, strips)))
    share = _pool().map if pieces[0].device.type == "cpu" and len(strips) > 1 else map
    return share(lambda strip, end: work(slice(end - len(strip), end), strip), strips, ends)


def _scales(amax: torch.Tensor, made: Fp8Weight, scheme: Scheme, rows: slice) -> torch.Tensor:
    """Returns the scales of a strip's cells. Unless shared, computes them from `amax` and stores them for `rows`."""
    if scheme.shared:
        return made.scale.view(1, 1)
    first = rows.start // scheme.cell[0]
    cells = slice(first, first + len(amax))
    if scheme.exponents:
        return powers_of_two(made.scale[cells].copy_(mx.scale(amax)))
    return _store(amax, made, cells)


def _strip(made: Fp8Weight, scheme: Scheme, rows: slice, strip: torch.Tensor) -> tuple[Sums, float]:
    """Quantizes `strip`, the `rows` of a weight, into `made`; returns error statistics and the largest magnitude."""
    height, width = (size or whole for size, whole in zip(scheme.cell, strip.shape, strict=True))
    arithmetic = _arithmetic(strip.device)
    amax = arithmetic.magnitudes(strip, height, width)
    scale = _scales(amax, made, scheme, rows)
    return arithmetic.cast(strip, scale, (height, width), made.data[rows]), float(amax.max())


@cache
def _pool() -> ThreadPoolExecutor:
    """Returns a pool with a thread per core, up to 8, each computing alone: torch's own wait on every operator.

    The processes that torchrun starts on a machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(max(1, min(8, cores)), "strips", initializer=_compute_alone, initargs=(torch.get_num_threads(),))


def _compute_alone(count: int) -> None:
    """Limits torch to one thread in this Python thread, but keeps `count` as the default of new ones.

    The default is the value set last in any thread, so it is set again in a temporary one.
    """
    torch.set_num_threads(1)
    others = Thread(target=torch.set_num_threads, args=(count,))
    others.start()
    others.join()


def _error(made: Fp8Weight, scheme: Scheme, found: Sums, largest: float) -> WeightError:
    ratio = found.noise / found.signal if found.signal else 0.0
    low, high = torch.aminmax(powers_of_two(made.scale) if scheme.exponents else made.scale)
    count = made.data.numel()
    return WeightError(
        relative=math.sqrt(ratio),
        sqnr_db=-10 * math.log10(ratio) if ratio else None,
        max_abs=found.worst,
        norm=math.sqrt(found.signal),
        amax=largest,
        scale_min=float(low),
        scale_max=float(high),
        zeros=found.zeros / count,
        saturated=found.saturated / count,
    )
