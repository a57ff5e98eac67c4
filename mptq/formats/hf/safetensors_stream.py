"""Writes safetensors files tensor by tensor, in any order, without holding a file in memory.

Format: 8 bytes of little-endian header length, a JSON header padded with spaces to a multiple of 8, then the tensors
without gaps. Tensors are ordered by dtype (widest first), then name, as in the safetensors library; this keeps every
tensor aligned. Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mptq.output.disk import PIECE_BYTES, begin_sync
from mptq.types import TensorSpec

if TYPE_CHECKING:
    import torch

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
_ALIGNMENT = ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8")
"""Dtypes in the order of the safetensors library: by size, then by its own enumeration."""


class ShardFile:
    """One safetensors file. The header is written first, then each tensor at its offset, in any order.

    `done` are the names of tensors that are already written. With `begun`, the file was created by another run or process
    and is reopened.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], done: Container[str] = (), begun: bool = False) -> None:
        ordered = sorted(specs, key=lambda spec: (_ALIGNMENT.index(spec.dtype), spec.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._specs: dict[str, tuple[TensorSpec, int]] = {}
        end = 0
        for spec in ordered:
            self._specs[spec.name] = (spec, end)
            end += spec.nbytes
            header[spec.name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end - spec.nbytes, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._missing = {name: spec.nbytes for name, (spec, _) in self._specs.items() if name not in done}
        self._descriptor = os.open(path, os.O_WRONLY | (0 if begun else os.O_CREAT | os.O_TRUNC), 0o644)
        if not begun:
            self._write(memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)
            os.truncate(self._descriptor, self._start + end)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the header has been written."""
        return not self._missing

    def write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Writes a tensor, or rows of it from row `first` on; dtype and shape must match its spec."""
        import torch

        spec, offset = self._specs[name]
        some = bool(spec.shape) and first + len(tensor) <= spec.shape[0] and tuple(tensor.shape[1:]) == spec.shape[1:]
        fits = some if tensor.nbytes < spec.nbytes else tuple(tensor.shape) == spec.shape
        assert fits, f"{name}: {list(tensor.shape)} from row {first}: not {spec}"
        assert str(tensor.dtype) == f"torch.{spec.dtype}", f"{name}: {tensor.dtype}, not {spec}"
        self._missing[name] -= tensor.nbytes
        if not self._missing[name]:
            del self._missing[name]
        place = offset + first * (spec.nbytes // spec.shape[0] if first else 0)
        self._write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()), self._start + place)

    def _write(self, view: memoryview, position: int) -> None:
        start, size = position, len(view)
        while view:
            count = os.pwrite(self._descriptor, view[:PIECE_BYTES], position)
            view, position = view[count:], position + count
        begin_sync(self._descriptor, start, size)

    def sync(self) -> None:
        """Waits until all written data is on disk."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def assign_shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Splits tensors, in order, into files of at most `max_bytes` each (a larger tensor gets its own file)."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards
