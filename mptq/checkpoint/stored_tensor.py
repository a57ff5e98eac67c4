"""Reads one tensor from a `torch.save` file: its dtype and sizes, and its bytes with their CRC-32. No torch.

Format: `data.pkl` calls `_rebuild_tensor_v2` or `_v3` (torch/_utils.py) with a storage, which is the member `data/KEY`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from isal import isal_zlib

from mptq.checkpoint.pickles import Inert, load_pickle
from mptq.checkpoint.torch_zip import Archive, Member, require_crc
from mptq.errors import CheckpointError
from mptq.types import DTYPE_BYTES

_PICKLE = 1 << 20  # size limit in bytes for the pickle of one tensor; usually about 200
_PIECE = 1 << 20  # bytes per read, checked while they are in the CPU cache
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_REBUILD = "torch._utils._rebuild_"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a storage, where element [i, j, ...] is at `start + i * strides[0] + j * strides[1] + ...`."""

    where: str
    member: Member
    dtype: str
    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the elements are contiguous in the storage, in row-major order."""
        expected = [math.prod(self.sizes[dim + 1 :]) for dim in range(len(self.sizes))]
        return all(size <= 1 or one == two for size, one, two in zip(self.sizes, self.strides, expected, strict=True))


def stored_tensor(archive: Archive) -> Stored:
    """Returns the tensor in a `torch.save` file.

    Raises CheckpointError if the file holds anything else, or fewer bytes than the tensor needs. Memory: its pickle.
    """
    if "byteorder" in archive.members and archive.read("byteorder", 16) != b"little":
        raise CheckpointError(f"{archive.where} is not little-endian: save the checkpoint again on a little-endian machine")
    value = load_pickle(archive.read("data.pkl", _PICKLE), archive.where)
    try:
        found = _parse(archive, value)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{archive.where} is not a plain tensor ({error!r}): the checkpoint is damaged") from error
    used = found.sizes and 0 in found.sizes
    last = found.start + sum((size - 1) * stride for size, stride in zip(found.sizes, found.strides, strict=True))
    if not used and (last + 1) * DTYPE_BYTES[found.dtype] > found.member.size:
        raise CheckpointError(f"{archive.where} has fewer bytes than its tensor needs: the checkpoint is damaged")
    return found


def _parse(archive: Archive, value: Any) -> Stored:
    if value.global_name == _REBUILD + "parameter":
        value = value.args[0]
    kind = value.global_name.removeprefix(_REBUILD)
    if kind not in ("tensor_v2", "tensor_v3"):
        raise ValueError(f"it is a {value.global_name}")
    storage, start, sizes, strides = value.args[:4]
    if not isinstance(storage, Inert) or storage.global_name != "torch.Storage":
        raise ValueError("its storage is not a torch storage")
    (_, storage_type, key, _, _) = storage.args[0]
    if kind == "tensor_v3":
        dtype = value.args[6].global_name.removeprefix("torch.")
    else:
        dtype = _STORAGES[storage_type.global_name.removeprefix("torch.")]
    numbers = (start, *sizes, *strides)
    if type(sizes) is not tuple or type(strides) is not tuple or len(sizes) != len(strides):
        raise ValueError("its sizes and strides are not tuples of the same length")
    if dtype not in DTYPE_BYTES or set(map(type, numbers)) != {int} or not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"invalid dtype {dtype}, or offset, sizes and strides {str(numbers)[:100]}")
    return Stored(archive.where, archive.members[f"data/{key}"], dtype, start, sizes, strides)


class Stream:
    """Reads the bytes of a member sequentially. With `check`, all bytes are read and their CRC-32 is verified."""

    def __init__(self, descriptor: int, stored: Stored, check: bool) -> None:
        self._descriptor = descriptor
        self._stored = stored
        self._check = check
        self._crc = 0
        self._position = 0

    def skip_to(self, position: int) -> None:
        """Advances to byte `position`."""
        if not self._check:
            self._position = position
            return
        scratch = memoryview(bytearray(min(_PIECE, max(position - self._position, 0))))
        while self._position < position:
            self.read_into(scratch[: position - self._position])

    def read_into(self, target: memoryview) -> None:
        """Fills `target` with the next bytes."""
        for first in range(0, len(target), _PIECE):
            piece = target[first : first + _PIECE]
            self._read_piece(piece)
            if self._check:
                self._crc = isal_zlib.crc32(piece, self._crc)

    def _read_piece(self, piece: memoryview) -> None:
        while piece:
            count = os.preadv(self._descriptor, [piece], self._stored.member.offset + self._position)
            if not count:
                raise CheckpointError(f"{self._stored.where} is truncated: copy the checkpoint again")
            self._position += count
            piece = piece[count:]

    def finish(self) -> None:
        """With `check`, reads the remaining bytes and raises CheckpointError if the CRC-32 does not match."""
        if self._check:
            self.skip_to(self._stored.member.size)
            require_crc(self._crc, self._stored.member, self._stored.where)
