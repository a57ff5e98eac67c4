"""The safe metadata index: every tensor and byte item of a torch_dist checkpoint, and where its bytes are. No torch.

Format: `.metadata` is a pickle of torch.distributed.checkpoint.metadata.Metadata; shards are `*.distcp` files in which
each chunk is a whole `torch.save` file at an offset (torch/distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptq.checkpoint.layout import Location, locate
from mptq.checkpoint.pickles import Inert, load_pickle, load_torch_zip
from mptq.errors import CheckpointError
from mptq.types import DTYPE_BYTES, TensorSpec


@dataclass(frozen=True, slots=True)
class Record:
    """`length` bytes at `offset` of `file`, relative to the checkpoint directory: one `torch.save` file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, at `offsets` with extents `sizes`, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    record: Record


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the checkpoint with its chunks."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that the metadata says: nothing is read from the shards but the training run's arguments.

    `args` is the Namespace of the training run as a dict, its enums and other classes inert, and `args_source` names
    where it was found. `fingerprint` is the SHA-256 of `.metadata`.
    """

    location: Location
    tensors: Mapping[str, Tensor]
    blobs: Mapping[str, Record]
    args: Mapping[str, Any]
    args_source: str
    fingerprint: str

    @property
    def directory(self) -> Path:
        """The directory that holds `.metadata`."""
        return self.location.directory

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors without their chunks."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}


def open_checkpoint(path: Path) -> Checkpoint:
    """Index the checkpoint at `path` (a root or an `iter_*` directory).

    Raises CheckpointError when it is damaged: unreadable metadata, a missing or truncated shard file, missing chunks.
    Memory: the index only, about 1 kB a chunk.
    """
    location = locate(path)
    metadata_file = location.directory / ".metadata"
    raw = metadata_file.read_bytes()
    metadata = load_pickle(raw, str(metadata_file))
    try:
        tensors, blobs = _entries(metadata)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{metadata_file} is not the metadata of a torch_dist checkpoint ({error!r})") from error
    records = [chunk.record for tensor in tensors.values() for chunk in tensor.chunks] + list(blobs.values())
    _check_files(location.directory, records)
    for tensor in tensors.values():
        _check_complete(tensor)
    args, args_source = _args(location.directory, blobs)
    return Checkpoint(location, tensors, blobs, args, args_source, hashlib.sha256(raw).hexdigest())


def _entries(metadata: Inert) -> tuple[dict[str, Tensor], dict[str, Record]]:
    """The tensors and byte items of an inert `Metadata`."""
    records: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for index, info in metadata.state["storage_data"].items():
        offset = index.state.get("offset")  # torch leaves out fields that are None
        place = None if offset is None else _size(offset)
        records[index.state["fqn"], place] = Record(*(info.state[key] for key in ("relative_path", "offset", "length")))

    tensors, blobs = {}, {}
    for name, entry in metadata.state["state_dict_metadata"].items():
        if entry.global_name.endswith(".BytesStorageMetadata"):
            blobs[name] = records[name, None]
            continue
        dtype = entry.state["properties"].state[0].global_name.removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name} has the unknown dtype {dtype}")
        chunks = []
        for chunk in entry.state["chunks"]:
            offsets = _size(chunk.state["offsets"])
            chunks.append(Chunk(offsets, _size(chunk.state["sizes"]), records[name, offsets]))
        tensors[name] = Tensor(TensorSpec(name, dtype, _size(entry.state["size"])), tuple(chunks))
    return tensors, blobs


def _size(value: Any) -> tuple[int, ...]:
    """The dimensions of an inert torch.Size."""
    return tuple(int(dim) for dim in value.args[0])


def _check_files(directory: Path, records: list[Record]) -> None:
    """Every record lies within its file, and no file lies outside the checkpoint."""
    ends: dict[str, int] = {}
    for record in records:
        ends[record.file] = max(ends.get(record.file, 0), record.offset + record.length)
    for name, end in sorted(ends.items()):
        file = directory / name
        if Path(name).name != name:
            raise CheckpointError(f"{directory}/.metadata names the shard {name!r}, which is outside the checkpoint")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: copy the whole checkpoint")
        if file.stat().st_size < end:
            raise CheckpointError(f"{file} is cut short: {file.stat().st_size} bytes of at least {end}; copy it again")


def _check_complete(tensor: Tensor) -> None:
    """The chunks have as many elements as the tensor."""
    stored = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
    if stored != tensor.spec.numel:
        raise CheckpointError(
            f"{tensor.spec.name} {list(tensor.spec.shape)} has chunks for {stored} of {tensor.spec.numel} elements: "
            "the checkpoint is incomplete"
        )


def read_blob(directory: Path, record: Record) -> bytes:
    """The bytes of a byte item: one `torch.save` file."""
    with (directory / record.file).open("rb") as file:
        file.seek(record.offset)
        return file.read(record.length)


def _args(directory: Path, blobs: Mapping[str, Record]) -> tuple[dict[str, Any], str]:
    """The training run's arguments: in the item `common_state` (megatron-core 0.17 on) or in `common.pt` (before)."""
    common = directory / "common.pt"
    item = next((name for name in blobs if name.partition("/")[0] == "common_state"), None)
    if common.is_file():
        source, state = "common.pt", load_torch_zip(common.read_bytes(), str(common))
    elif item is not None:
        source, state = "common_state", load_torch_zip(read_blob(directory, blobs[item]), f"{directory}: {item}")
        state = state[0] if isinstance(state, list) and state else state
    else:
        return {}, "nowhere"
    args = state.get("args") if isinstance(state, dict) else None
    if isinstance(args, Inert) and isinstance(args.state, dict):
        return args.state, f"args in {source}"
    return {}, f"no args in {source}"
