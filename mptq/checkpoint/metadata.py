"""The entries of `.metadata`: what each tensor is, and where its chunks and the byte items are, checked against each other.

Format: a pickle of torch.distributed.checkpoint.metadata.Metadata (and filesystem._StorageInfo). Its hundreds of thousands
of records become tuples as they are unpickled, and are checked by columns: a checkpoint of a trillion parameters has
300,000 of them.
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
# megatron-core adds the plans of all ranks, mostly the last and the larger half of the file, which mptq has no use for.
_PLANS = re.compile(rb"\x8c\x0fall_local_plans")
_END = b"ub."  # the items are set, the object gets them as its state, and that is all
_FRAME = 1 << 20  # bytes, more than a pickle's frame has
_PIECE = 1 << 24  # bytes that are read at once
_MAX_NAME = 1024
_MAX_RANK = 16


class Chunk(NamedTuple):
    """A box of a tensor, at `offsets` with extents `sizes`, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    record: StorageRecord


class Tensor(NamedTuple):
    """A tensor of the checkpoint: its chunks at `offsets`, with extents `sizes`, are in `records`, each in the same order."""

    spec: TensorSpec
    offsets: Sequence[tuple[int, ...]] = ()
    sizes: Sequence[tuple[int, ...]] = ()
    records: Sequence[StorageRecord] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Each by itself, made when they are asked for: a checkpoint has hundreds of thousands."""
        return tuple(map(Chunk, self.offsets, self.sizes, self.records))


class _Box:
    """torch's ChunkStorageMetadata. A state is emptied once read: the pickle's memo keeps it alive to the end."""

    __slots__ = ("offsets", "sizes")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.offsets, self.sizes = state["offsets"], state["sizes"]
        state.clear()


class _Index:
    """torch's MetadataIndex: the name of an entry, and the offset of a chunk, None for byte items."""

    __slots__ = ("fqn", "offset")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fqn, self.offset = state["fqn"], state.get("offset")
        state.clear()


class _Info:
    """torch's _StorageInfo: where a record is."""

    __slots__ = ("place",)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("transform_descriptors"):
            raise CheckpointError(
                "the checkpoint's shards were transformed (compressed) as they were written: save it without extensions"
            )
        if type(state["relative_path"]) is not str:
            raise TypeError("a record of a file without a name")
        self.place = (state["relative_path"], state["offset"], state["length"])
        state.clear()


_KNOWN = {
    # A size becomes the tuple it is made of, that very object: () + dims, which takes nothing but tuples.
    "torch.Size": ().__add__,
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata": _Box,
    "torch.distributed.checkpoint.metadata.MetadataIndex": _Index,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _Info,
}


def read_entries(file: Path, names: set[str] | None = None) -> tuple[dict[str, Tensor], dict[str, StorageRecord]]:
    """The tensors and the byte items of a metadata file.

    Every tensor's chunks cover it exactly, and no chunk has more bytes than its record. Raises CheckpointError otherwise. The
    globals that the file refers to are added to `names`.
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
    """The bytes of a metadata file up to the first key that may be the plans', and the end of an object's state.

    What comes after is not even read. Memory: the bytes, and 16 MB.
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
    # The frame that the end is in must be whole. The buffer gives its bytes away: a bytearray would be copied to be unpickled.
    whole.truncate(filled if place < 0 else place + _FRAME)
    return whole.getvalue()


def _without_plans(raw: bytes, where: str, names: set[str] | None) -> Inert | None:
    """The Metadata that `raw` describes, or None where its end is not that of the pickle's outermost object.

    The key of the plans comes last in what megatron-core writes, but nothing promises that: torch may give its dataclass other
    fields or another order, and a tensor or an object of the planner may have this name. The outermost object is the first that
    a pickle makes: where it is also the last that is given its state, the cut was between two of its fields.
    """
    made: list[Inert] = []

    class Metadata(Inert):
        """torch's Metadata."""

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
    """The records of chunks by name and offset, and those of byte items by name."""
    names = list(map(attrgetter("fqn"), storage))
    offsets = list(map(attrgetter("offset"), storage))
    if not set(map(type, names)) <= {str} or not _are_integers(filter(None, offsets)):
        raise TypeError("an index of something else than a name and a tuple of integers")
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
    """Rows of a NamedTuple, made without its own slower function; `values` have its length."""
    return map(tuple.__new__, repeat(row), values)


def _are_integers(sizes: Iterable[tuple[int, ...]]) -> bool:
    """Whether all elements are integers, and no booleans: these have a hash that cannot recurse."""
    return set(map(type, chain.from_iterable(sizes))) <= {int}


_Places = dict[str, dict[tuple[int, ...], StorageRecord]]
_Boxes = list[tuple[int, ...]]
_Grids = dict[tuple[int, ...], tuple[_Boxes, _Boxes, set[tuple[int, ...]]]]


def _tensor(name: str, state: dict[str, Any], records: dict[tuple[int, ...], StorageRecord], grids: _Grids) -> Tensor:
    """One tensor; `grids` are the offsets and sizes of chunks, by shape, that were found to be good in others.

    With them are the different sizes, of which there is mostly one.
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
        raise ValueError(f"the name {ascii(name)[:80]} of an entry")


def _check_sizes(name: str, sizes: _Boxes, shape: tuple[int, ...]) -> None:
    """All are tuples of as many integers (no booleans) as `shape`, none negative or larger than a file can be."""
    if not set(map(type, sizes)) <= {tuple} or not _are_integers(sizes):
        raise ValueError(f"{name} has sizes that are no integers")
    if not set(map(len, sizes)) <= {len(shape)} or len(shape) > _MAX_RANK:
        raise ValueError(f"{name} has chunks of another number of dimensions, or too many")
    numbers = set(chain.from_iterable(sizes))
    if numbers and not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"{name} has sizes out of range")


def _check_cover(name: str, shape: tuple[int, ...], offsets: list[tuple[int, ...]], sizes: list[tuple[int, ...]]) -> None:
    """The chunks hold every element of the tensor once."""
    if covers(shape, offsets, sizes):
        return
    numel, stored = math.prod(shape), sum(map(math.prod, sizes))
    what = f"{name} {list(shape)} has chunks"
    if stored != numel:
        raise CheckpointError(f"{what} for {stored} of {numel} elements: the checkpoint is incomplete or damaged")
    raise CheckpointError(f"{what} that overlap: the checkpoint is damaged")
