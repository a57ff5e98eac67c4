"""The schemes by which a linear can be quantized: one record each, which everything that differs between them reads. No torch.

Another scheme is another record here. Its arithmetic is that of its `cell` (quantize/quantizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mptq.errors import RecipeError

WHOLE = 0
"""All rows or all columns, as a size of a cell."""
STRIP_ROWS = 128
"""Rows that are quantized at once, whole cells: few enough for temporaries to stay in cache, however tall the matrix."""


@dataclass(frozen=True, eq=False, slots=True)
class Scheme:
    """How one linear's weight is stored in FP8 (E4M3), and whether its input has a calibrated scale.

    `name` is unique, and what the manifest has; `scale` is what a recipe calls the kind of its scales (`weights.scale`).
    `cell` are the rows and columns of a weight that have one scale; the rows divide `STRIP_ROWS`. `modelopt` are the
    attributes of ModelOpt's weight quantizer. `forms` are the dialects of the Hugging Face format that carry it, with what
    their configs say of it (formats/hf/quantization_config.py). With `exponents`, scales are powers of two, stored as E8M0
    bytes.
    """

    name: str
    scale: str
    words: str
    cell: tuple[int, int]
    modelopt: Mapping[str, Any]
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    static: bool = False
    exponents: bool = False

    def __post_init__(self) -> None:
        if self.cell[0] and STRIP_ROWS % self.cell[0]:
            raise ValueError(f"{self.name}: the rows of a cell must divide {STRIP_ROWS}, and {self.cell[0]} do not")

    @property
    def shared(self) -> bool:
        """Whether a whole weight has one scale, which is then that of all linears that engines fuse."""
        return self.cell == (WHOLE, WHOLE)

    @property
    def block(self) -> int | None:
        """Rows and columns of a square block, or None for scales that are not of square blocks."""
        return self.cell[0] if self.cell[0] == self.cell[1] != WHOLE else None

    @property
    def block_size(self) -> int | None:
        """What a recipe calls the size of its blocks: 128 x 128, or 32 columns of one row; None without blocks."""
        return self.cell[1] or None

    @property
    def scale_dtype(self) -> str:
        """Torch's name of the scales' dtype: E8M0 bytes (2 ** (byte - 127)) or float32."""
        return "uint8" if self.exponents else "float32"

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns that a weight must be whole multiples of, so that engines read it."""
        rows, columns = self.cell
        return rows or 1, columns or 1

    def grid(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a weight [rows, columns]: ceil-divided by the cell, or [] for one scale."""
        if self.shared:
            return ()
        height, width = self.cell
        return -(-rows // (height or rows)), -(-columns // (width or columns))


_E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
_PER_CHANNEL = {
    "weights": {"strategy": "channel", "dynamic": False},
    "input_activations": {"strategy": "token", "dynamic": True},
}
"""compressed-tensors' one scale a row, activations quantized per token: the form that every engine reads."""

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "tensor",
            "tensor",
            "FP8, one scale a fused group",
            (WHOLE, WHOLE),
            _E4M3,
            # Engines read one scale a row everywhere, and one a tensor not everywhere: it is repeated for every row.
            {"compressed-tensors": _PER_CHANNEL},
        ),
        Scheme("row", "row", "FP8, one scale a row", (1, WHOLE), _E4M3 | {"axis": 0}, {"compressed-tensors": _PER_CHANNEL}),
        Scheme(
            "block",
            "block",
            "FP8, 128x128 blocks",
            (128, 128),
            _E4M3 | {"block_sizes": {-1: 128, -2: 128}},
            {
                "deepseek-fp8": {"weight_block_size": [128, 128]},
                "compressed-tensors": {
                    "weights": {"strategy": "block", "block_structure": [128, 128], "dynamic": False},
                    "input_activations": {"strategy": "group", "group_size": 128, "dynamic": True},
                },
            },
        ),
        Scheme(
            "tensor-static",
            "tensor",
            "FP8, one scale a fused group, static activations",
            (WHOLE, WHOLE),
            _E4M3,
            {
                "compressed-tensors": {
                    "weights": {"strategy": "tensor", "dynamic": False},
                    "input_activations": {"strategy": "tensor", "dynamic": False},
                },
                "modelopt": {"quant_algo": "FP8"},
            },
            static=True,
        ),
        Scheme(
            "mx",
            "mx",
            "MXFP8, blocks of 32",
            (1, 32),
            {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
            {"modelopt": {"quant_algo": "MXFP8", "group_size": 32}},
            exponents=True,
        ),
    )
}
"""By name. Sources of the forms: docs/formats.md."""

ROWS = SCHEMES["row"]
"""What `misaligned: per-channel` falls back to: it fits every shape."""


def scheme_named(name: str) -> Scheme:
    """The scheme whose `name` that is; raises RecipeError for any other word."""
    if name not in SCHEMES:
        raise RecipeError(f"there is no scheme {name!r}: there are {', '.join(SCHEMES)}")
    return SCHEMES[name]


def carried(dialect: str) -> list[str]:
    """Names of the schemes that a dialect of the Hugging Face format carries."""
    return [scheme.name for scheme in SCHEMES.values() if dialect in scheme.forms]
