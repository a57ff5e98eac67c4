"""Types shared between stages. Imports no torch at run time: planning and `inspect` never load it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "uint8": 1,
    "int8": 1,
    "bool": 1,
}
"""Bytes per element, by torch's dtype name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (torch's name, such as "bfloat16") and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes when stored densely."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A checkpoint tensor, or one layer or expert of a stacked tensor, that holds an inner tensor or some of its rows.

    `index` is the position in the leading dimensions of a stacked tensor, and `stack` the sizes of these dimensions;
    both are empty for a tensor that is not stacked. `shape` is the shape of the slice. `spelled` is the variant of the
    inner name that this checkpoint uses, unstacked and without the prefix.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    spelled: str = ""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A quantized weight. It dequantizes to `data * scale`, with the scale broadcast over its block.

    `data` is float8_e4m3fn [out, in]. `scale` is float32, a multiplier (amax / 448): [] per tensor, [out, 1] per row,
    or a ceil-divided grid for blocks (`Scheme.grid`). For MX it is uint8 [out, in / 32] and stands for 2 ** (byte -
    127). `amax` has the same shape as `scale`, which is computed from it (448 where all weights are zero); None if not
    needed, and for MX.
    """

    data: torch.Tensor
    scale: torch.Tensor
    amax: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class WeightError:
    """Quantization error of a weight, computed in float32.

    `relative` is the Frobenius norm of the difference divided by that of the source; `sqnr_db` is the same in decibels
    (-20 log10), None if there is no error; `max_abs` is the largest absolute difference. `norm` is the Frobenius norm
    of the source and `amax` its largest magnitude. `scale_min` and `scale_max` are the range of the scales. `zeros` and
    `saturated` are the fractions (0 to 1) of elements that became 0 and that became the largest value, 448 times the
    scale.
    """

    relative: float
    sqnr_db: float | None
    max_abs: float
    norm: float
    amax: float
    scale_min: float
    scale_max: float
    zeros: float
    saturated: float


@dataclass(slots=True)
class LayerOutput:
    """A piece of a unit (a layer, or the tensors outside the layers) that is passed to the writers.

    `index` is the unit's number. `tensors` maps each format to output names and tensors in CPU memory, `blobs` to names
    and byte items (ModelOpt's quantizer state of a linear). `last` marks the last piece of the unit. If the tensors are
    rows of larger ones, `first` is the number of their first row.
    """

    index: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    blobs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    last: bool = False
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors and byte items."""
        tensors = sum(tensor.nbytes for group in self.tensors.values() for tensor in group.values())
        return tensors + sum(len(blob) for group in self.blobs.values() for blob in group.values())
