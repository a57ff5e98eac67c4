"""Values that cross the borders between stages. No torch at run time: planning and `inspect` never load it."""

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
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (torch's name, as in "bfloat16") and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, stored densely."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A tensor of the checkpoint, or one layer or expert of a stack, that makes up (some rows of) an inner tensor.

    `index` is the place in the leading dimensions of a stack, whose sizes are `stack`; both are empty where there is no stack.
    `spelled` is the inner name as this checkpoint has it: without stacks and prefix.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    spelled: str = ""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A quantized weight: the original is close to `data * scale`, the scale broadcast over its block.

    `data` is float8_e4m3fn [out, in]. `scale` is float32 and multiplies (amax / 448): [] for one scale a tensor, [out, 1]
    for rows, a ceil-divided grid for blocks (`Scheme.grid`). For MX it is uint8 [out, in / 32] and means 2 ** (byte - 127).
    `amax`, of the same shape, is what the scale is of (448 for zeros alone); None where nobody wants it, and for MX.
    """

    data: torch.Tensor
    scale: torch.Tensor
    amax: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far a quantized weight is from its source, in float32.

    `relative` is the Frobenius norm of the difference over that of the source; `sqnr_db` is the same in decibels
    (-20 log10), None for no error at all; `norm` is the Frobenius norm of the source and `amax` its largest magnitude.
    `scale_min` and `scale_max` are the range of the scales; `zeros` and `saturated` the shares (0 to 1) of elements that
    became 0 and that became the largest value, 448 times the scale.
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
    """What the writers get at once of a unit (a layer, or tensors outside the layers): tensors for each format.

    `tensors` maps a format to output names and tensors in CPU memory, `blobs` to names and byte items (ModelOpt's quantizer
    state of a linear). `last` says that nothing of the unit follows.
    `first` is the row that the tensors begin with, where they are rows of larger ones.
    """

    index: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    blobs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    last: bool = False
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and byte items."""
        tensors = sum(tensor.nbytes for group in self.tensors.values() for tensor in group.values())
        return tensors + sum(len(blob) for group in self.blobs.values() for blob in group.values())
