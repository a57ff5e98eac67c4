"""Writes the Megatron format: torch_dist with one key per layer and ModelOpt state, for megatron-core with ModelOpt.

Keys and shapes are those of a model that ModelOpt quantized and compressed and megatron-core saved (one key per layer and
expert, gated fc1 split into `weight_w` and `weight_v`, quantizer tensors, `_extra_state/shard_0_1`). There is one file per
unit, in which each tensor is a complete `torch.save` archive and each byte item is stored as raw bytes
(torch/distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mptq.formats.protocol import Writer
from mptq.output.disk import PieceFile, begin_sync
from mptq.types import LayerOutput


class _MetadataPickler(pickle.Pickler):
    """Omits the strides that torch 2.15 added to TensorProperties: torch 2.14 and earlier cannot read them."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not TensorProperties:
            return NotImplemented
        return copyreg.__newobj__, (TensorProperties,), value.__getstate__()[:5]  # type: ignore[attr-defined]


BACKEND = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()
"""`metadata.json` of a torch_dist checkpoint."""
Account = dict[str, list[Any]]
"""Name in a unit's file -> offset and length in bytes; for tensors also dtype and shape."""


class MegatronWriter(Writer):
    """Writes `iter_*` under `directory`, the checkpoint root, with one file per unit. Memory: a copy of a tensor view.

    `rest` returns the files of the whole checkpoint by name; it is called once all units are written. `accounts` are the
    accounts of units that an earlier run has written, by number.
    """

    def __init__(
        self,
        directory: Path,
        iteration: int | None,
        rest: Callable[[], Mapping[str, bytes]] = dict,
        accounts: Mapping[int, Account] = MappingProxyType({}),
    ) -> None:
        self.root, self.rest = directory, rest
        self.tracker = str(iteration) if iteration is not None else "release"
        self.directory = directory / (f"iter_{iteration:07d}" if iteration is not None else "release")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._accounts = dict(accounts)
        self._open: io.BufferedWriter | None = None
        self._account: Account = {}

    @property
    def complete(self) -> list[Path]:
        """The files that an earlier run completed."""
        return [self._file(unit) for unit in self._accounts]

    def _file(self, unit: int) -> Path:
        return self.directory / f"__{unit}_0.distcp"

    def write(self, output: LayerOutput) -> list[Path]:
        """Writes tensors and byte items; after the last of a unit, waits until its file is on disk and returns it."""
        file = self._file(output.index)
        if self._open is None:
            self._open, self._account = io.BufferedWriter(PieceFile(file, "wb")), {}
        for name, blob in output.blobs["megatron"].items():
            self._account[name] = [self._open.tell(), self._open.write(blob)]
        for name, tensor in output.tensors["megatron"].items():
            start = self._open.tell()
            _save(tensor, self._open)
            about = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            self._account[name] = [start, self._open.tell() - start, *about]
            begin_sync(self._open.fileno(), start, self._open.tell() - start)
        if not output.last:
            return []
        self._accounts[output.index] = self._account
        self._open.flush()
        os.fsync(self._open.fileno())
        self.abort()
        return [file]

    def account(self) -> Account:
        """The account of the last written unit, for the journal."""
        return self._account

    def join(self, accounts: Mapping[int, Account]) -> None:
        """Takes the accounts of all units once all processes have written theirs."""
        self._accounts = dict(accounts)

    def _metadata(self) -> Metadata:
        """Builds the metadata from the accounts alone, so that it does not depend on how often the run was stopped."""
        entries: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for unit in sorted(self._accounts):
            for name, (offset, length, *about) in self._accounts[unit].items():
                start = None
                if about:
                    size = torch.Size(about[1])
                    start = torch.Size([0] * len(size))
                    properties = TensorProperties(dtype=getattr(torch, about[0]))
                    entries[name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(start, size)])
                else:
                    entries[name] = BytesStorageMetadata()
                places[MetadataIndex(name, start)] = _StorageInfo(self._file(unit).name, offset, length)
        return Metadata(state_dict_metadata=entries, storage_data=places)

    def finish(self) -> list[Path]:
        """Writes the metadata, ModelOpt's state and the training arguments (unchanged), and returns all files."""
        # torch's FileSystemWriter would add the path and a random id, but the same input must give the same bytes.
        with (self.directory / ".metadata").open("wb") as file:
            _MetadataPickler(file).dump(self._metadata())
        files = {
            self.directory / "metadata.json": BACKEND,
            self.root / "latest_checkpointed_iteration.txt": self.tracker.encode(),
        } | {self.directory / name: content for name, content in self.rest().items()}
        for path, content in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return [*self.complete, self.directory / ".metadata", *files]

    def abort(self) -> None:
        """Closes the open file without flushing, which would fail again on a full disk."""
        if self._open is not None:
            self._open.raw.close()
            self._open = None


def _save(tensor: torch.Tensor, file: io.BufferedWriter) -> None:
    """Saves the tensor with `torch.save`; raises OSError if the file cannot be written."""
    try:
        torch.save(_alone(tensor), file)
    except RuntimeError as error:
        # After a failed write, torch still tries to finish its archive and raises that second error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its own storage, because torch.save writes the whole storage."""
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
