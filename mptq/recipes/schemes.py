"""The quantization schemes for a linear, one record each; all scheme-dependent code reads these records. No torch.

To add a scheme, add a record here. Its `cell` determines the arithmetic (quantize/quantizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mptq.errors import RecipeError

WHOLE = 0
"""A cell size that means all rows or all columns."""
STRIP_ROWS = 128
"""Rows quantized at once, in whole cells: few enough that temporaries stay in the CPU cache."""


@dataclass(frozen=True, eq=False, slots=True)
class Scheme:
    """How one linear's weight is stored in FP8 (E4M3), and whether its input has a calibrated scale.

    `name` is unique and is written to the manifest; `scale` is the kind of scale in a recipe (`weights.scale`); `words`
    describe the scheme for display. `cell` is the number of rows and columns of a weight that share a scale; the rows
    divide `STRIP_ROWS`. `modelopt` has the attributes of ModelOpt's weight quantizer. `forms` maps the dialects of the
    Hugging Face format that support the scheme to its fields in their configs (formats/hf/quantization_config.py). With
    `static`, the input has a calibrated scale. With `exponents`, scales are powers of two, stored as E8M0 bytes; with
    `powers`, they are powers of two stored as float32.
    """

    name: str
    scale: str
    words: str
    cell: tuple[int, int]
    modelopt: Mapping[str, Any]
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    static: bool = False
    exponents: bool = False
    powers: bool = False

    def __post_init__(self) -> None:
        if self.cell[0] and STRIP_ROWS % self.cell[0]:
            raise ValueError(f"{self.name}: the rows of a cell must divide {STRIP_ROWS}, but {self.cell[0]} do not")

    @property
    def shared(self) -> bool:
        """Whether a weight has a single scale, which it shares with all linears that engines fuse with it."""
        return self.cell == (WHOLE, WHOLE)

    @property
    def block(self) -> int | None:
        """Side of a square block, or None if the cells are not square blocks."""
        return self.cell[0] if self.cell[0] == self.cell[1] != WHOLE else None

    @property
    def is_requantized(self) -> bool:
        """Whether Blackwell's loaders quantize the weight again, for kernels whose block scales are powers of two."""
        return self.block is not None and not self.powers

    @property
    def block_size(self) -> int | None:
        """The `block_size` of a recipe: 128 for 128x128 blocks, 32 for 32 columns of a row; None without blocks."""
        return self.cell[1] or None

    @property
    def scale_format(self) -> str:
        """The `scale_format` of a recipe: ue8m0 for powers of two in float32."""
        return "ue8m0" if self.powers else "float32"

    @property
    def scale_dtype(self) -> str:
        """Torch's name for the dtype of the scales: uint8 for E8M0 bytes (2 ** (byte - 127)), or float32."""
        return "uint8" if self.exponents else "float32"

    @property
    def unit(self) -> tuple[int, int]:
        """Numbers of which a weight's rows and columns must be multiples for engines to load it."""
        rows, columns = self.cell
        return rows or 1, columns or 1

    def grid(self, rows: int, columns: int) -> tuple[int, ...]:
        """Returns the shape of the scales of a weight [rows, columns]: ceil-divided by the cell, or () for one."""
        if self.shared:
            return ()
        height, width = self.cell
        return -(-rows // (height or rows)), -(-columns // (width or columns))


_E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
_PER_CHANNEL = {
    "weights": {"strategy": "channel", "dynamic": False},
    "input_activations": {"strategy": "token", "dynamic": True},
}
"""One scale per row and per-token activations in compressed-tensors, the form that every engine can load."""

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "tensor",
            "tensor",
            "FP8, one scale a fused group",
            (WHOLE, WHOLE),
            _E4M3,
            # All engines load one scale per row, but not all load one per tensor: the scale is repeated for every row.
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
            "block-ue8m0",
            "block",
            "FP8, 128x128 blocks, power-of-two scales",
            (128, 128),
            _E4M3 | {"block_sizes": {-1: 128, -2: 128}},
            {"deepseek-fp8": {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}},
            powers=True,
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
"""All schemes by name. The sources of the forms are in docs/formats.md."""

ROWS = SCHEMES["row"]
"""The fallback for `misaligned: per-channel`, which fits every shape."""


def scheme_named(name: str) -> Scheme:
    """Returns the scheme with this name; raises RecipeError if there is none."""
    if name not in SCHEMES:
        raise RecipeError(f"unknown scheme {name!r}: use one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def carried(dialect: str) -> list[str]:
    """Returns the names of the schemes that a dialect of the Hugging Face format supports."""
    return [scheme.name for scheme in SCHEMES.values() if dialect in scheme.forms]
