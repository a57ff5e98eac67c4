"""Reads tensors of a checkpoint, or one layer or expert of a stacked tensor, directly into their destination.

Only the chunks that overlap the request are read, and torch unpickles none of them. When a storage is first read, all
of its bytes are checked against the CRC-32 in its zip; later reads from the same storage (of a stack of layers) are not
checked.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch

from mptq.checkpoint.stored_tensor import Stored, Stream, stored_tensor
from mptq.checkpoint.torch_zip import open_record
from mptq.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mptq.checkpoint.index import Checkpoint, Chunk, StorageRecord
    from mptq.types import TensorSlice

_BLOCK = 4 << 20  # bytes to cast or scatter at once


class Reader:
    """Random access to the tensors of one checkpoint. Memory: an index of the chunks of the tensors read so far."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stacks: dict[tuple[str, int], _Stack] = {}
        self._checked: dict[StorageRecord, Stored] = {}

    def read(self, name: str, out: torch.Tensor, index: tuple[int, ...] = (), first: int = 0) -> torch.Tensor:
        """Fills `out` with tensor `name`, or with `name[index]` of a stack of layers or experts; casts to its dtype.

        If `out` has fewer rows than the tensor, it gets the rows starting at `first`.

        Raises CheckpointError naming the file and the tensor if a record does not match the metadata or its checksum.
        Peak memory: `out` and 8 MB, plus the whole chunk if it is stored non-contiguously.
        """
        tensor = self.checkpoint.tensors[name]
        shape = tensor.spec.shape[len(index) :]
        fits = shape[1:] == out.shape[1:] and first + len(out) <= shape[0] if shape else not out.shape
        assert fits, f"{name}: {list(tensor.spec.shape)} into {list(out.shape)} from row {first}"
        key = name, len(index)
        if key not in self._stacks:
            self._stacks[key] = _Stack(tensor.chunks, len(index))
        for chunk in self._stacks[key].at(index):
            try:
                self._read_chunk(name, chunk, _Place(out, index, first))
            except OSError as error:
                file = self.checkpoint.directory / chunk.record.file
                raise CheckpointError(f"{name} in {file} cannot be read: {error.strerror or error}") from error
        return out

    def read_parts(self, parts: Sequence[TensorSlice], out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Fills `out` with the rows of `parts`, concatenated, starting at row `first`."""
        row = -first
        for part in parts:
            low, high = max(row, 0), min(row + part.shape[0], len(out))
            if low < high:
                self.read(part.key, out[low:high], part.index, low - row)
            row += part.shape[0]
        return out

    def _read_chunk(self, name: str, chunk: Chunk, wanted: _Place) -> None:
        """Fills the part of `wanted` that `chunk` covers."""
        target, place, skipped = wanted.within(chunk)
        if not target.numel():
            return
        record = chunk.record
        file = self.checkpoint.directory / record.file
        where = f"{name} in {file} at byte {record.offset}"
        with open_record(file, where, record.offset, record.length) as archive:
            known = self._checked.get(record)
            stored = known or _as_said(stored_tensor(archive), chunk, self.checkpoint.tensors[name].spec.dtype)
            _copy(Stream(archive.descriptor, stored, check=known is None), stored, (place, skipped), target)
        if target.numel() < math.prod(chunk.sizes):  # the rest of the chunk may be read later
            self._checked[record] = stored


class _Place(NamedTuple):
    """The destination of a read: `out` is filled with index `at` of a stack, starting at row `first`."""

    out: torch.Tensor
    at: tuple[int, ...]
    first: int

    def within(self, chunk: Chunk) -> tuple[torch.Tensor, list[int], int]:
        """Returns the part of `out` that a chunk covers, the index in the chunk, and how many rows to skip there."""
        depth, target, skipped = len(self.at), self.out, 0
        for dim, (start, size) in enumerate(zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)):
            low, high = start, start + size
            if dim == 0:
                low, high = max(start - self.first, 0), min(start + size - self.first, len(self.out))
                skipped = low + self.first - start
            target = target.narrow(dim, low, max(high - low, 0)) if low < target.shape[dim] else target.narrow(dim, 0, 0)
        return target, [number - start for number, start in zip(self.at, chunk.offsets, strict=False)], skipped


class _Stack:
    """The chunks of a tensor, indexed by their position in its leading dimensions."""

    def __init__(self, chunks: Sequence[Chunk], depth: int) -> None:
        self._single: defaultdict[tuple[int, ...], list[Chunk]] = defaultdict(list)
        self._several: list[Chunk] = []
        for chunk in chunks:
            if math.prod(chunk.sizes[:depth]) == 1:
                self._single[chunk.offsets[:depth]].append(chunk)
            else:
                self._several.append(chunk)

    def at(self, index: tuple[int, ...]) -> Iterator[Chunk]:
        """Yields the chunks that overlap `tensor[index]`."""
        yield from self._single.get(index, ())
        for chunk in self._several:
            edges = zip(index, chunk.offsets, chunk.sizes, strict=False)
            if all(start <= number < start + size for number, start, size in edges):
                yield chunk


def _as_said(stored: Stored, chunk: Chunk, dtype: str) -> Stored:
    """Returns the stored tensor; raises CheckpointError unless it matches the metadata of the chunk."""
    if (stored.dtype, stored.sizes) != (dtype, chunk.sizes):
        raise CheckpointError(
            f"{stored.where} is {stored.dtype} {list(stored.sizes)}, but the metadata says {dtype} {list(chunk.sizes)}: "
            "the checkpoint is damaged"
        )
    return stored


def _copy(stream: Stream, stored: Stored, where: tuple[list[int], int], target: torch.Tensor) -> None:
    """Fills `target` with the rows of `stored[place]` after the first `skipped`, where `where` = (place, skipped)."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    place, skipped = where
    if stored.contiguous:
        strides = [math.prod(stored.sizes[dim + 1 :]) for dim in range(len(stored.sizes))]
        first = stored.start + sum(number * stride for number, stride in zip((*place, skipped), strides, strict=False))
        stream.skip_to(first * dtype.itemsize)
        _fill(stream, target, dtype)
        stream.finish()
    else:
        storage = torch.empty(stored.member.size // dtype.itemsize, dtype=dtype)
        stream.read_into(_bytes(storage))
        stream.finish()
        whole = storage.as_strided(stored.sizes, stored.strides, stored.start)[tuple(place)]
        target.copy_(whole[skipped : skipped + len(target)] if whole.dim() else whole)


def _fill(stream: Stream, target: torch.Tensor, dtype: torch.dtype) -> None:
    """Fills `target` with the next bytes: directly, or in blocks of rows if they must be cast or scattered."""
    if target.dtype == dtype and target.is_contiguous():
        stream.read_into(_bytes(target))
        return
    rows = target if target.dim() else target[None]
    for block in rows.split(max(1, _BLOCK // (rows[0].numel() * dtype.itemsize))):
        buffer = torch.empty(block.shape, dtype=dtype)
        stream.read_into(_bytes(buffer))
        block.copy_(buffer)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
