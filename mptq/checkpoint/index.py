"""The safe metadata index: every tensor and byte item of a torch_dist checkpoint, and where its bytes are. No torch.

Format: `.metadata` lists the entries (metadata.py); shards are `*.distcp` files in which each chunk is a complete
`torch.save` file at an offset (torch/distributed/checkpoint/filesystem.py, torch_zip.py).
"""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import add, attrgetter, gt
from pathlib import Path, PurePosixPath
from typing import Any

from mptq.checkpoint.locate import Location, locate
from mptq.checkpoint.metadata import Chunk, Tensor, read_entries
from mptq.checkpoint.pickles import Inert, foreign, gc_paused
from mptq.checkpoint.sources import run_config
from mptq.checkpoint.torch_zip import StorageRecord, load_torch_file, open_record
from mptq.errors import CheckpointError
from mptq.files import sha256
from mptq.types import TensorSpec

__all__ = ["Checkpoint", "Chunk", "StorageRecord", "Tensor", "open_checkpoint", "read_blob"]
_METADATA = 4 << 30  # size limit of .metadata in bytes: a trillion parameters take 100 MB
_END = 4096  # bytes; the central directory of the zip that torch writes for a tensor is smaller
_DEPTH, _VALUES = 100, 1_000_000  # limits for the training arguments, which are about 800 values in 4 levels


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of the metadata. Only the training arguments are read from the shards.

    `args` is the training run's Namespace as a dict, with enums and other classes inert, and `args_source` where it was
    found. `config` is the run config saved with the weights, as plain data with `model` and `tokenizer`, and
    `config_source` its file. `fingerprint` is the SHA-256 of `.metadata`. `foreign` lists the globals that these
    pickles refer to and that no Megatron checkpoint needs.
    """

    location: Location
    tensors: Mapping[str, Tensor]
    blobs: Mapping[str, StorageRecord]
    args: Mapping[str, Any]
    args_source: str
    fingerprint: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_source: str = "no run config"
    foreign: Sequence[str] = ()

    @property
    def directory(self) -> Path:
        """The directory that holds `.metadata`."""
        return self.location.directory

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors without their chunks."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}


def open_checkpoint(path: Path, iteration: int | None = None) -> Checkpoint:
    """Indexes the checkpoint at `path`: a checkpoint, or a root of which `iteration` selects one (see locate.py).

    Raises CheckpointError if it is damaged: unreadable metadata, missing or truncated shard files, missing or
    overlapping chunks or records. Memory: about 2 kB per chunk while the metadata is read, then 300 bytes.
    """
    location = locate(path, iteration)
    metadata_file = location.directory / ".metadata"
    if metadata_file.stat().st_size > _METADATA:
        raise CheckpointError(f"{metadata_file} has {metadata_file.stat().st_size} bytes: too large for checkpoint metadata")
    with gc_paused(), ThreadPoolExecutor(1) as beside:
        digest = beside.submit(sha256, metadata_file)
        names: set[str] = set()
        tensors, blobs = read_entries(metadata_file, names)
        records = chain.from_iterable(tensor.records for tensor in tensors.values())
        _check_records(location.directory, chain(records, blobs.values()))
    args, args_source = _args(location.directory, blobs, names)
    config, config_source = run_config(location)
    fingerprint = digest.result()
    return Checkpoint(location, tensors, blobs, args, args_source, fingerprint, config, config_source, foreign(names))


def _check_records(directory: Path, records: Iterable[StorageRecord]) -> None:
    """Checks that every record lies within its file and overlaps no other, and that every file is in the checkpoint."""
    files: defaultdict[str, list[StorageRecord]] = defaultdict(list)
    for record in records:
        files[record.file].append(record)
    for name, places in sorted(files.items()):
        size = _shard_size(directory, name)
        try:
            array("q", chain(map(_offset, places), map(_length, places)))  # the fastest check that all are integers
        except (TypeError, OverflowError) as error:
            where = f"{directory}/.metadata has records of {name}"
            raise CheckpointError(f"{where} whose offsets or lengths are not integers: it is damaged") from error
        places.sort(key=_offset)
        offsets = list(map(_offset, places))
        ends = list(map(add, offsets, map(_length, places)))
        if offsets[0] < 0 or any(map(gt, offsets, ends)) or any(map(gt, ends, offsets[1:])):
            raise CheckpointError(f"{directory}/.metadata has records of {name} that overlap: the checkpoint is damaged")
        if size < ends[-1]:
            raise CheckpointError(f"{directory / name} is truncated: {size} bytes of at least {ends[-1]}; copy it again")


_offset, _length = attrgetter("offset"), attrgetter("length")


def _shard_size(directory: Path, name: str) -> int:
    """Returns the size of a shard in bytes; checks that it is a file (or a link to one) within the directory."""
    path = PurePosixPath(name) if name.isprintable() else PurePosixPath("..")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise CheckpointError(f"{directory}/.metadata names the shard {ascii(name)[:200]}, which is outside the checkpoint")
    try:
        found = (directory / path).stat()
    except OSError as error:
        raise CheckpointError(f"{directory / path} is missing ({error.strerror}): copy the whole checkpoint") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{directory / path} is not a file: copy the whole checkpoint")
    return found.st_size


def read_blob(directory: Path, record: StorageRecord) -> bytes:
    """Returns the bytes of a byte item, a `torch.save` file; raises CheckpointError if its checksums do not match."""
    file = directory / record.file
    with open_record(file, f"{file} at byte {record.offset}", record.offset, record.length) as archive:
        for name, member in archive.members.items():
            archive.read(name, member.size)
        return os.pread(archive.descriptor, record.length, record.offset)


def ends_of_shards(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Returns the SHA-256 of the sizes and the last bytes of the shards that hold the tensors `names`.

    `.metadata` alone does not identify weights: it is the same for all checkpoints of a model with the same layout. A
    shard ends with the central directory of its last zip, which has the CRC-32 of that tensor.
    """
    digest = hashlib.sha256()
    for name in sorted({record.file for tensor in names for record in checkpoint.tensors[tensor].records}):
        with (checkpoint.directory / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END))
            digest.update(f"{name} {size} ".encode() + file.read())
    return digest.hexdigest()


def _args(directory: Path, blobs: Mapping[str, StorageRecord], names: set[str]) -> tuple[dict[str, Any], str]:
    """Returns the training arguments, from `common_state` (megatron-core 0.17 or later) or `common.pt` (earlier)."""
    common = directory / "common.pt"
    item = next((name for name in blobs if name.partition("/")[0] == "common_state"), None)
    if common.is_file():
        source, where = "common.pt", str(common)
        state = load_torch_file(common, where, names=names)
    elif item is not None:
        source, where = "common_state", f"{directory}: {item}"
        state = load_torch_file(directory / blobs[item].file, where, blobs[item], names)
        state = state[0] if isinstance(state, list) and state else state
    else:
        return {}, "nowhere"
    args = state.get("args") if isinstance(state, dict) else None
    if isinstance(args, Inert) and isinstance(args.state, dict):
        _require_plain(args.state, where)
        return args.state, f"args in {source}"
    return {}, f"no args in {source}"


def _require_plain(args: dict[Any, Any], where: str) -> None:
    """Checks that the arguments are safe to print: limited in number and nesting, with valid Unicode text."""
    values: list[Any] = [args]
    for _ in range(_DEPTH):
        values = list(islice(chain.from_iterable(map(_inside, values)), _VALUES))
        if not values:
            return
        if len(values) == _VALUES:
            break
        if any(isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value) for value in values):
            raise CheckpointError(f"{where}: the arguments contain invalid Unicode: the checkpoint is damaged")
    raise CheckpointError(f"{where}: the arguments are too many or too deeply nested: the checkpoint is damaged")


def _inside(value: Any) -> Iterable[Any]:
    """Returns the direct contents of a value, which in a pickle can include the value itself."""
    if isinstance(value, dict):
        return chain(value, value.values())
    if isinstance(value, Inert):
        return (*value.args, value.state)
    return value if isinstance(value, list | tuple | set | frozenset) else ()
