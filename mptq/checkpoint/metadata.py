"""Reads the entries of `.metadata` (tensors, and the places of their chunks and of byte items) and cross-checks them.

Format: a pickle of torch.distributed.checkpoint.metadata.Metadata (and filesystem._StorageInfo). Records become tuples
as they are unpickled and are checked column by column, because a checkpoint of a trillion parameters has 300,000 of
them.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, gt
from pathlib import Path
from typing import Any, NamedTuple, Self

from mptq.checkpoint.chunk_cover import covers
from mptq.checkpoint.pickles import Inert, load_pickle
from mptq.checkpoint.torch_zip import StorageRecord
from mptq.errors import CheckpointError
from mptq.types import DTYPE_BYTES, TensorSpec

_METADATA = "torch.distributed.checkpoint.metadata.Metadata"
_WANTED = {"state_dict_metadata", "storage_data"}
# megatron-core adds the plans of all ranks, usually at the end and more than half of the file. mptq does not need them.
_PLANS = re.compile(rb"\x8c\x0fall_local_plans")
_END = b"ub."  # SETITEMS, BUILD, STOP: set the items, make them the object's state, end
_FRAME = 1 << 20  # bytes, more than a pickle frame has
_PIECE = 1 << 24  # bytes per read
_MAX_NAME = 1024
_MAX_RANK = 16


class Chunk(NamedTuple):
    """A box of a tensor at `offsets` with extents `sizes`, and the record that stores it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    record: StorageRecord


class Tensor(NamedTuple):
    """A tensor of the checkpoint. Its chunks have `offsets`, `sizes` and `records`, all in the same order."""

    spec: TensorSpec
    offsets: Sequence[tuple[int, ...]] = ()
    sizes: Sequence[tuple[int, ...]] = ()
    records: Sequence[StorageRecord] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks as objects, built on demand because a checkpoint has hundreds of thousands of them."""
        return tuple(map(Chunk, self.offsets, self.sizes, self.records))


class _Box:
    """torch's ChunkStorageMetadata. The state is cleared once read, because the pickle memo keeps it alive."""

    __slots__ = ("offsets", "sizes")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.offsets, self.sizes = state["offsets"], state["sizes"]
        state.clear()


class _Index:
    """torch's MetadataIndex: the name of an entry and the offset of a chunk (None for byte items)."""

    __slots__ = ("fqn", "offset")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fqn, self.offset = state["fqn"], state.get("offset")
        state.clear()


class _Info:
    """torch's _StorageInfo: the place of a record."""

    __slots__ = ("place",)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("transform_descriptors"):
            raise CheckpointError(
                "the checkpoint's shards were transformed (for example compressed) when written: save it without extensions"
            )
        if type(state["relative_path"]) is not str:
            raise TypeError("a record whose file name is not a string")
        self.place = (state["relative_path"], state["offset"], state["length"])
        state.clear()


_KNOWN = {
    # () + dims returns the very tuple that a size is built from, and accepts only tuples.
    "torch.Size": ().__add__,
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata": _Box,
    "torch.distributed.checkpoint.metadata.MetadataIndex": _Index,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _Info,
}


def read_entries(file: Path, names: set[str] | None = None) -> tuple[dict[str, Tensor], dict[str, StorageRecord]]:
    """Returns the tensors and the byte items of a metadata file.

    Raises CheckpointError unless every tensor's chunks cover it exactly and no chunk has more bytes than its record.
    Adds the globals that the file refers to to `names`.
    """
    metadata = _without_plans(_before_plans(file), str(file), names)
    if metadata is None:
        metadata = load_pickle(file.read_bytes(), str(file), _KNOWN, names)
    try:
        return _entries(metadata)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        reason = repr(error)[:200]
        raise CheckpointError(f"{file} is not the metadata of a torch_dist checkpoint ({reason})") from error


def _before_plans(file: Path) -> bytes:
    """Returns the bytes of a metadata file up to the first key that may be that of the plans, closed with `_END`.

    The rest of the file is not read. Memory: these bytes and 16 MB.
    """
    with file.open("rb", buffering=0) as opened:
        whole = io.BytesIO(bytes(os.fstat(opened.fileno()).st_size))
        filled, place = 0, -1
        with whole.getbuffer() as view:
            while place < 0 or filled < place + _FRAME:
                count = opened.readinto(view[filled : filled + _PIECE])
                if not count:
                    break
                if place < 0 and (plans := _PLANS.search(view, max(0, filled - _FRAME), filled + count)):
                    place = plans.start()
                filled += count
            if place >= 0:
                view[place : place + len(_END)] = _END
    # The frame that contains the end must be complete. BytesIO gives up its bytes; a bytearray would be copied.
    whole.truncate(filled if place < 0 else place + _FRAME)
    return whole.getvalue()


def _without_plans(raw: bytes, where: str, names: set[str] | None) -> Inert | None:
    """Returns the Metadata that `raw` describes, or None if the cut was not between two fields of the outermost object.

    megatron-core writes the plans last, but that is not guaranteed: torch may add or reorder fields of its dataclass,
    and a tensor or a planner object may have the same name. The outermost object is the first that a pickle creates. If
    it is also the last that is given its state, the cut was between two of its fields.
    """
    made: list[Inert] = []

    class Metadata(Inert):
        """Stands for torch's Metadata."""

        __slots__ = ()
        global_name = _METADATA

        def __new__(cls, *args: Any, **_kwargs: Any) -> Self:
            self = super().__new__(cls, *args)
            made.append(self)
            return self

    try:
        found = load_pickle(raw, where, _KNOWN | {_METADATA: Metadata}, names)
    except CheckpointError:
        return None
    whole = bool(made) and found is made[0] and isinstance(found.state, dict) and found.state.keys() >= _WANTED
    return found if whole else None


def _entries(metadata: Inert) -> tuple[dict[str, Tensor], dict[str, StorageRecord]]:
    records, items = _records(metadata.state["storage_data"])
    tensors: dict[str, Tensor] = {}
    blobs: dict[str, StorageRecord] = {}
    grids: _Grids = {}
    for name, entry in metadata.state["state_dict_metadata"].items():
        if entry.global_name.endswith(".BytesStorageMetadata"):
            _check_name(name)
            blobs[name] = items[name]
        else:
            tensors[name] = _tensor(name, entry.state, records[name], grids)
    return tensors, blobs


def _records(storage: dict[_Index, _Info]) -> tuple[_Places, dict[str, StorageRecord]]:
    """Returns the records of chunks by name and offset, and those of byte items by name."""
    names = list(map(attrgetter("fqn"), storage))
    offsets = list(map(attrgetter("offset"), storage))
    if not set(map(type, names)) <= {str} or not _are_integers(filter(None, offsets)):
        raise TypeError("an index that is not a name and a tuple of integers")
    found: defaultdict[str, dict[tuple[int, ...], StorageRecord]] = defaultdict(dict)
    items: dict[str, StorageRecord] = {}
    places = _as(StorageRecord, map(attrgetter("place"), storage.values()))
    for name, offset, record in zip(names, offsets, places, strict=True):
        if offset is None:
            items[name] = record
        else:
            found[name][offset] = record
    return dict(found), items


def _as[Row: tuple[Any, ...]](row: type[Row], values: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
    """Builds rows of a NamedTuple while bypassing its slower constructor; `values` must have the right length."""
    return map(tuple.__new__, repeat(row), values)


def _are_integers(sizes: Iterable[tuple[int, ...]]) -> bool:
    """Whether all elements are integers and not booleans; hashing integers cannot recurse."""
    return set(map(type, chain.from_iterable(sizes))) <= {int}


_Places = dict[str, dict[tuple[int, ...], StorageRecord]]
_Boxes = list[tuple[int, ...]]
_Grids = dict[tuple[int, ...], tuple[_Boxes, _Boxes, set[tuple[int, ...]]]]


def _tensor(name: str, state: dict[str, Any], records: dict[tuple[int, ...], StorageRecord], grids: _Grids) -> Tensor:
    """Returns one checked tensor.

    `grids` caches, by shape, the chunk offsets and sizes that were valid for an earlier tensor, with the set of
    distinct sizes, of which there is usually one.
    """
    _check_name(name)
    dtype = state["properties"].state[0].global_name.removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    shape = state["size"]
    offsets = list(map(attrgetter("offsets"), state["chunks"]))
    sizes = list(map(attrgetter("sizes"), state["chunks"]))
    _check_sizes(name, [shape], shape)
    if grids.get(shape, ())[:2] != (offsets, sizes):
        _check_sizes(name, sizes, shape)
        _check_sizes(name, offsets, shape)
        _check_cover(name, shape, offsets, sizes)
        grids[shape] = offsets, sizes, set(sizes)
    offsets, sizes, different = grids[shape]
    places = [records[offset] for offset in offsets]
    most = {size: math.prod(size) * DTYPE_BYTES[dtype] for size in different}
    wanted = repeat(*most.values()) if len(most) == 1 else map(most.__getitem__, sizes)
    if any(map(gt, wanted, map(attrgetter("length"), places))):
        raise CheckpointError(f"{name} has chunks with more bytes than their records: the checkpoint is damaged")
    return Tensor(TensorSpec(name, dtype, shape), offsets, sizes, places)


def _check_name(name: Any) -> None:
    if type(name) is not str or not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"invalid entry name {ascii(name)[:80]}")


def _check_sizes(name: str, sizes: _Boxes, shape: tuple[int, ...]) -> None:
    """Checks that all sizes are tuples of len(shape) integers (not booleans), non-negative and below 2 ** 63."""
    if not set(map(type, sizes)) <= {tuple} or not _are_integers(sizes):
        raise ValueError(f"{name} has sizes that are not integers")
    if not set(map(len, sizes)) <= {len(shape)} or len(shape) > _MAX_RANK:
        raise ValueError(f"{name} has chunks with a different number of dimensions, or too many dimensions")
    numbers = set(chain.from_iterable(sizes))
    if numbers and not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"{name} has sizes out of range")


def _check_cover(name: str, shape: tuple[int, ...], offsets: list[tuple[int, ...]], sizes: list[tuple[int, ...]]) -> None:
    """Checks that the chunks cover every element of the tensor once."""
    if covers(shape, offsets, sizes):
        return
    numel, stored = math.prod(shape), sum(map(math.prod, sizes))
    what = f"{name} {list(shape)} has chunks"
    if stored != numel:
        raise CheckpointError(f"{what} for {stored} of {numel} elements: the checkpoint is incomplete or damaged")
    raise CheckpointError(f"{what} that overlap: the checkpoint is damaged")
