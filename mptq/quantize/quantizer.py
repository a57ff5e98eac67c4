"""Quantization in strips of rows, by a thread for each core: ModelOpt's numbers bit for bit, and their error, in one pass.

ModelOpt goes through whole matrices in float32, several times. Here a strip is read twice, once for its magnitudes and once for
all else. Source of the arithmetic: modelopt/torch/quantization/qtensor/fp8_tensor.py; of MX: mx.py.
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
"""Elements of a strip: enough to make up for its start, few enough for a CPU's cache, and for temporaries on a GPU."""


def _arithmetic(device: torch.device) -> ModuleType:
    """Where the loops over elements are: compiled for a CPU, in torch's operators for everything else."""
    if device.type == "cpu":
        from mptq.quantize import cpu_kernels

        return cpu_kernels
    from mptq.quantize import torch_kernels

    return torch_kernels


def amax_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Largest magnitude of `tensor` [any], float32 []; raises CheckpointError naming `name` and what is not finite."""
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
    """Raise CheckpointError naming `name` and the first place when `tensor` [any] holds NaN or infinity."""
    amax_of(tensor, name)


def quantize(
    weight: torch.Tensor | Sequence[torch.Tensor], scheme: Scheme, name: str, amax: torch.Tensor | None = None
) -> tuple[Fp8Weight, WeightError]:
    """`weight` [out, in], of any float dtype, in FP8, and how far that is from it.

    It may come in pieces, one above the other, of whole cells but for the last: rows of a larger matrix, not copied.
    `amax` is the magnitude that one scale a tensor is for, of all members of a fused group; its own where it is None.
    Raises CheckpointError naming `name` for a weight that is not finite. Peak memory: the result, 4 MB a thread for float16,
    and 0.4 GB on a GPU.
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
    """The memory of what a weight in `pieces` becomes."""
    shape, device = (sum(len(piece) for piece in pieces), pieces[0].shape[1]), pieces[0].device
    grid = scheme.grid(*shape)
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if scheme.exponents:
        return Fp8Weight(data, torch.empty(grid, dtype=torch.uint8, device=device))
    return Fp8Weight(data, torch.empty(grid, device=device), torch.empty(grid, device=device))


def _store(amax: torch.Tensor, made: Fp8Weight, at: Any) -> torch.Tensor:
    """Store magnitudes, `floored`, and their scales, amax / 448: ModelOpt finds the one that belongs to the other."""
    assert made.amax is not None
    made.amax[at] = floored(amax)
    made.scale[at] = scale_of(made.amax[at])
    return made.scale[at]


def in_place(fusion: Fusion, scheme: Scheme, weight: torch.Tensor) -> bool:
    """Whether rows of a member are quantized where they are in the fused `weight`: without a copy that takes longer.

    Cells must not cross from one member into another, and rows that belong together must be worth a strip.
    """
    if fusion.repeat == 1:
        return True
    large = min(fusion.widths) * weight.shape[1] >= _STRIP[weight.device.type] // 8
    return large and fusion.aligned(scheme.unit[0])


def _each_strip[Found](pieces: Sequence[torch.Tensor], work: Callable[[slice, torch.Tensor], Found]) -> Iterator[Found]:
    """What `work` makes of each strip of each piece and its rows in all of them, in order; on a CPU several at a time."""
    height = max(1, _STRIP[pieces[0].device.type] // (pieces[0].shape[1] * STRIP_ROWS)) * STRIP_ROWS
    strips = [strip for piece in pieces for strip in piece.split(height)]
    ends = list(accumulate(map(len, strips)))
    share = _pool().map if pieces[0].device.type == "cpu" and len(strips) > 1 else map
    return share(lambda strip, end: work(slice(end - len(strip), end), strip), strips, ends)


def _scales(amax: torch.Tensor, made: Fp8Weight, scheme: Scheme, rows: slice) -> torch.Tensor:
    """The scales of the cells of a strip from their magnitudes, which it stores as those of the strip's `rows`."""
    if scheme.shared:
        return made.scale.view(1, 1)
    first = rows.start // scheme.cell[0]
    cells = slice(first, first + len(amax))
    if scheme.exponents:
        return powers_of_two(made.scale[cells].copy_(mx.scale(amax)))
    return _store(amax, made, cells)


def _strip(made: Fp8Weight, scheme: Scheme, rows: slice, strip: torch.Tensor) -> tuple[Sums, float]:
    """Quantize `strip`, the `rows` of a weight, into `made`; return what it adds up to, and its largest magnitude."""
    height, width = (size or whole for size, whole in zip(scheme.cell, strip.shape, strict=True))
    arithmetic = _arithmetic(strip.device)
    amax = arithmetic.magnitudes(strip, height, width)
    scale = _scales(amax, made, scheme, rows)
    return arithmetic.cast(strip, scale, (height, width), made.data[rows]), float(amax.max())


@cache
def _pool() -> ThreadPoolExecutor:
    """A thread for each core, up to 8, that computes alone: torch's own would wait for each other after every operator.

    The processes that torchrun starts on a machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(max(1, min(8, cores)), "strips", initializer=_compute_alone, initargs=(torch.get_num_threads(),))


def _compute_alone(count: int) -> None:
    """Let torch use one thread in this one, and `count` in those that it has not given a number yet.

    It gives them what was set last, in whatever thread: here in one that ends at once.
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
