"""Small torch_dist checkpoints with any content, built from torch's own classes, without megatron-core."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from pathlib import Path
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

SHARD = "__0_0.distcp"


def saved(value: Any) -> bytes:
    """The bytes of a `torch.save` file."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Maker:
    """Builds a checkpoint; every record is appended to one shard."""

    def __init__(self) -> None:
        self.metadata = Metadata({}, storage_data={})
        self.shard = bytearray()

    def record(self, raw: bytes, name: str, offset: tuple[int, ...] | None) -> _StorageInfo:
        info = _StorageInfo(SHARD, len(self.shard), len(raw))
        self.shard += raw
        self.metadata.storage_data[MetadataIndex(name, offset)] = info
        return info

    def tensor(
        self, name: str, tensor: torch.Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    ) -> None:
        """Add a tensor in chunks, given as (offsets, sizes)."""
        boxes = boxes or [((0,) * tensor.dim(), tuple(tensor.shape))]
        entry = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [])
        for offset, size in boxes:
            part = tensor[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]
            self.stored(name, entry, offset, saved(part.clone()), size)
        self.metadata.state_dict_metadata[name] = entry

    def stored(self, name: str, entry: TensorStorageMetadata, offset: tuple, raw: bytes, size: tuple) -> None:
        self.record(raw, name, torch.Size(offset))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))

    def raw_tensor(self, name: str, like: torch.Tensor, raw: bytes) -> None:
        """Add a tensor of one chunk, whose record is `raw`."""
        entry = TensorStorageMetadata(TensorProperties(like.dtype), like.shape, [])
        self.stored(name, entry, (0,) * like.dim(), raw, tuple(like.shape))
        self.metadata.state_dict_metadata[name] = entry

    def blob(self, name: str, raw: bytes) -> None:
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self.record(raw, name, None)

    def write(self, root: Path) -> Path:
        """Write the checkpoint as `root`/iter_0000005."""
        directory = root / "iter_0000005"
        directory.mkdir(parents=True)
        (directory / SHARD).write_bytes(self.shard)
        (directory / ".metadata").write_bytes(pickle.dumps(self.metadata))
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        return directory


def small() -> Maker:
    """A stack of layers in chunks of two layers and of halves, a vector, a scalar, and training arguments."""
    made = Maker()
    torch.manual_seed(0)
    halves = [((layer, half, 0), (2, 3, 5)) for layer in (0, 2) for half in (0, 3)]
    made.tensor("decoder.layers.weight", torch.randn(4, 6, 5).bfloat16(), halves)
    made.tensor("decoder.final_layernorm.weight", torch.randn(7))
    made.tensor("scale", torch.tensor(3.0))
    made.blob("common_state/shard_0_1", saved([{"args": Namespace(num_layers=4, hidden_size=5), "iteration": 5}]))
    return made
