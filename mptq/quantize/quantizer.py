"""Quantizes weights in strips of rows, with a thread per core. Matches ModelOpt bit for bit, and measures the error.

ModelOpt makes several passes over whole matrices in float32. Here each strip is read twice, once for amax and once for
everything else. Source of the arithmetic: modelopt/torch/quantization/qtensor/fp8_tensor.py; for MX: mx.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Thread
from types import ModuleType
from typing import Any

import torch

from mptq.errors import CheckpointError
from mptq.quantize import mx
from mptq.quantize.error_statistics import Sums
from mptq.quantize.fp8 import LARGEST_CODE, fitted, powers_of_two, scale_of, strips
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
    amax = torch.stack(list(each_strip(matrix, lambda _rows, strip: magnitudes(strip, *strip.shape)))).amax()
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
    weight: torch.Tensor, scheme: Scheme, name: str, amax: torch.Tensor | None = None
) -> tuple[Fp8Weight, WeightError]:
    """Quantizes `weight` [out, in], of any float dtype, to FP8; returns the result and its error.

    `amax`, float32 of the shape of the scales, are the magnitudes to scale for, such as that of a fused group; None
    uses the weight's own. For MX, their scales are the powers of two that fit them. Raises CheckpointError with `name`
    for a weight that is not finite. Peak memory: the result, plus 4 MB per thread for float16, or 0.4 GB on a GPU.
    """
    made = unfilled(tuple(weight.shape), scheme, weight.device)
    if scheme.shared and amax is None:
        amax = amax_of(weight, name)
    if amax is not None and scheme.exponents:
        made.scale.copy_(mx.scale(amax))
    elif amax is not None:
        _store(amax, made, scheme, ...)
    sums, largest = Sums(), 0.0
    for more, magnitude in each_strip(weight, partial(_strip, made, scheme, amax is not None)):
        sums.add(more)
        largest = max(largest, magnitude)
    if not math.isfinite(sums.signal):
        require_finite(weight, name)
    return made, _error(made, scheme, sums, largest)


def measured(source: torch.Tensor, made: Fp8Weight, scheme: Scheme) -> WeightError:
    """Returns the error of a quantized weight against its `source` [out, in], wherever its codes come from."""
    sums, largest = Sums(), float(amax_of(source, "weight"))
    for rows, values, _ in strips(made, scheme):
        original, codes = source[rows].float(), made.data[rows].view(torch.uint8) & 0x7F
        error = values.sub_(original)
        sums.add(
            Sums(
                noise=float(error.double().square_().sum()),
                signal=float(original.double().square_().sum()),
                worst=float(torch.linalg.vector_norm(error, math.inf)),
                zeros=int((codes == 0).sum()),
                saturated=int((codes == LARGEST_CODE).sum()),
            )
        )
    return _error(made, scheme, sums, largest)


def unfilled(shape: tuple[int, ...], scheme: Scheme, device: torch.device) -> Fp8Weight:
    """Allocates, uninitialized, a quantized weight of `shape` [out, in]."""
    grid = scheme.grid(*shape)
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if scheme.exponents:
        return Fp8Weight(data, torch.empty(grid, dtype=torch.uint8, device=device))
    return Fp8Weight(data, torch.empty(grid, device=device), torch.empty(grid, device=device))


def _store(amax: torch.Tensor, made: Fp8Weight, scheme: Scheme, at: Any) -> torch.Tensor:
    """Stores `fitted` amax, and returns and stores its scales, amax / 448. ModelOpt computes each from the other."""
    assert made.amax is not None
    made.amax[at] = fitted(amax, scheme)
    made.scale[at] = scale_of(made.amax[at])
    return made.scale[at]


def each_strip[Found](weight: torch.Tensor, work: Callable[[slice, torch.Tensor], Found]) -> Iterator[Found]:
    """Yields `work(rows, strip)` for the strips of `weight`, in order; on a CPU, strips are processed in parallel."""
    height = max(1, _STRIP[weight.device.type] // (weight.shape[1] * STRIP_ROWS)) * STRIP_ROWS
    parts, starts = weight.split(height), range(0, len(weight), height)
    share = thread_pool().map if weight.device.type == "cpu" and len(parts) > 1 else map
    return share(lambda strip, start: work(slice(start, start + len(strip)), strip), parts, starts)


def _scales(amax: torch.Tensor, made: Fp8Weight, scheme: Scheme, rows: slice, known: bool) -> torch.Tensor:
    """Returns the scales of a strip's cells. Unless `known`, computes them from `amax` and stores them for `rows`."""
    if scheme.shared:
        return made.scale.view(1, 1)
    first = rows.start // scheme.cell[0]
    cells = slice(first, first + len(amax))
    if scheme.exponents:
        return powers_of_two(made.scale[cells] if known else made.scale[cells].copy_(mx.scale(amax)))
    return made.scale[cells] if known else _store(amax, made, scheme, cells)


def _strip(made: Fp8Weight, scheme: Scheme, known: bool, rows: slice, strip: torch.Tensor) -> tuple[Sums, float]:
    """Quantizes `strip`, the `rows` of a weight, into `made`; returns error statistics and the largest magnitude."""
    height, width = (size or whole for size, whole in zip(scheme.cell, strip.shape, strict=True))
    arithmetic = _arithmetic(strip.device)
    amax = arithmetic.magnitudes(strip, height, width)
    scale = _scales(amax, made, scheme, rows, known)
    return arithmetic.cast(strip, scale, (height, width), made.data[rows]), float(amax.max())


@cache
def thread_pool() -> ThreadPoolExecutor:
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
