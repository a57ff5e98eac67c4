"""Read tensors of a checkpoint, whole or one layer or expert out of a stack, straight into where they are wanted.

Only the chunks that overlap the request are read, and none of them is unpickled by torch. Every byte that a storage has
is checked by the CRC-32 in its zip when it is first read; what is then read again of a stack of layers is not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from mptq.checkpoint.records import open_record
from mptq.checkpoint.stored import Stored, Stream, stored_tensor
from mptq.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mptq.arch.places import Part
    from mptq.checkpoint.index import Checkpoint, Chunk, Record

_BLOCK = 4 << 20  # bytes that are cast or scattered at once


class Reader:
    """Random access to the tensors of one checkpoint. Memory: the places of the chunks of the stacks that were read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stacks: dict[tuple[str, int], _Stack] = {}
        self._checked: dict[Record, Stored] = {}

    def read(self, name: str, out: torch.Tensor, index: tuple[int, ...] = ()) -> torch.Tensor:
        """Fill `out` with tensor `name`, or with `name[index]` of a stack of layers (or experts); casts to the dtype of `out`.

        Raises CheckpointError naming the file and the tensor when a record is not what the metadata says, or has changed.
        Peak memory: `out` and 8 MB; for a chunk that is stored transposed, that chunk too.
        """
        tensor = self.checkpoint.tensors[name]
        assert tensor.spec.shape[len(index) :] == tuple(out.shape), f"{name}: {list(tensor.spec.shape)} into {list(out.shape)}"
        key = name, len(index)
        if key not in self._stacks:
            self._stacks[key] = _Stack(tensor.chunks, len(index))
        for chunk in self._stacks[key].at(index):
            try:
                self._read_chunk(name, chunk, out, index)
            except OSError as error:
                file = self.checkpoint.directory / chunk.record.file
                raise CheckpointError(f"{name} in {file} cannot be read: {error.strerror or error}") from error
        return out

    def read_parts(self, parts: Sequence[Part], out: torch.Tensor) -> torch.Tensor:
        """Fill `out` with `parts`, one above the other by rows."""
        row = 0
        for part in parts:
            self.read(part.key, out[row : row + part.shape[0]], part.index)
            row += part.shape[0]
        return out

    def _read_chunk(self, name: str, chunk: Chunk, out: torch.Tensor, index: tuple[int, ...]) -> None:
        """Fill the part of `out` that `chunk` has."""
        if 0 in chunk.sizes:
            return
        depth = len(index)
        target = out
        for dim, (start, size) in enumerate(zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)):
            target = target.narrow(dim, start, size)
        place = [number - start for number, start in zip(index, chunk.offsets, strict=False)]
        record = chunk.record
        file = self.checkpoint.directory / record.file
        where = f"{name} in {file} at byte {record.offset}"
        with open_record(file, where, record.offset, record.length) as archive:
            known = self._checked.get(record)
            stored = known or _as_said(stored_tensor(archive), chunk, self.checkpoint.tensors[name].spec.dtype)
            _copy(Stream(archive.descriptor, stored, check=known is None), stored, place, target)
        if math.prod(chunk.sizes[:depth]) > 1:  # others of the stack are in this chunk too
            self._checked[record] = stored


class _Stack:
    """The chunks of a tensor by their place in its leading dimensions."""

    def __init__(self, chunks: Sequence[Chunk], depth: int) -> None:
        self._single: defaultdict[tuple[int, ...], list[Chunk]] = defaultdict(list)
        self._several: list[Chunk] = []
        for chunk in chunks:
            if math.prod(chunk.sizes[:depth]) == 1:
                self._single[chunk.offsets[:depth]].append(chunk)
            else:
                self._several.append(chunk)

    def at(self, index: tuple[int, ...]) -> Iterator[Chunk]:
        """The chunks that have something of `tensor[index]`."""
        yield from self._single.get(index, ())
        for chunk in self._several:
            edges = zip(index, chunk.offsets, chunk.sizes, strict=False)
            if all(start <= number < start + size for number, start, size in edges):
                yield chunk


def _as_said(stored: Stored, chunk: Chunk, dtype: str) -> Stored:
    """The stored tensor, which is what the metadata says of the chunk."""
    if (stored.dtype, stored.sizes) != (dtype, chunk.sizes):
        raise CheckpointError(
            f"{stored.where} is {stored.dtype} {list(stored.sizes)}, but the metadata says {dtype} {list(chunk.sizes)}: "
            "the checkpoint is damaged"
        )
    return stored


def _copy(stream: Stream, stored: Stored, place: list[int], target: torch.Tensor) -> None:
    """Fill `target` with `stored[place]`."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if stored.contiguous:
        strides = (math.prod(stored.sizes[dim + 1 :]) for dim in range(len(place)))
        first = stored.start + sum(number * stride for number, stride in zip(place, strides, strict=True))
        stream.skip_to(first * dtype.itemsize)
        _fill(stream, target, dtype)
        stream.finish()
    else:
        storage = torch.empty(stored.member.size // dtype.itemsize, dtype=dtype)
        stream.read_into(_bytes(storage))
        stream.finish()
        target.copy_(storage.as_strided(stored.sizes, stored.strides, stored.start)[tuple(place)])


def _fill(stream: Stream, target: torch.Tensor, dtype: torch.dtype) -> None:
    """Fill `target` with what comes next: directly, or by blocks of rows where it is cast or scattered."""
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
