"""Read tensors of a checkpoint, whole or one layer or expert out of a stack, with torch's own DCP planning.

Only the chunks that overlap the request are read, each decoded by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mptq.errors import CheckpointError

if TYPE_CHECKING:
    import io
    from collections.abc import Sequence

    from mptq.arch.places import Part
    from mptq.checkpoint.index import Checkpoint, Tensor


class _Into(LoadPlanner):
    """Directs every read item into its box of one destination tensor."""

    def __init__(self, destination: torch.Tensor) -> None:
        self.destination = destination

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        box = self.destination
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dim, start, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the reader has copied into the destination."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item} is a byte item")

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        raise AssertionError("the plan is made in Reader.read")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


class Reader:
    """Random access to the tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._storage = FileSystemReader(checkpoint.directory)
        self._metadata = {name: _dcp_metadata(tensor) for name, tensor in checkpoint.tensors.items()}
        index = {
            MetadataIndex(name, torch.Size(chunk.offsets)): _StorageInfo(
                chunk.record.file, chunk.record.offset, chunk.record.length
            )
            for name, tensor in checkpoint.tensors.items()
            for chunk in tensor.chunks
        }
        metadata = Metadata(state_dict_metadata=dict(self._metadata), storage_data=index)
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)

    def read(self, name: str, out: torch.Tensor, index: tuple[int, ...] = ()) -> torch.Tensor:
        """Fill `out` with tensor `name`, or with `name[index]` of a stack of layers (or experts); casts to the dtype of `out`.

        Raises CheckpointError naming the file and the tensor when a record cannot be decoded.
        Peak memory: `out` and the largest chunk.
        """
        metadata = self._metadata[name]
        destination = out[(None,) * len(index)]
        origin = (*index, *[0] * out.dim())
        assert len(origin) == len(metadata.size), f"{name}: {list(metadata.size)} into {list(out.shape)}"
        wanted = ChunkStorageMetadata(offsets=torch.Size(origin), sizes=destination.shape)
        items = create_read_items_for_chunk_list(name, metadata, [wanted])
        # DCP finds chunks by the index it gives them; ours are found by offset alone.
        for item in items:
            object.__setattr__(item.storage_index, "index", None)
        try:
            self._storage.read_data(LoadPlan(items), _Into(destination))
        except (RuntimeError, ValueError, EOFError, OSError, AssertionError, pickle.UnpicklingError) as error:
            files = sorted({chunk.record.file for chunk in self.checkpoint.tensors[name].chunks})
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{name} in {self.checkpoint.directory} ({', '.join(files[:3])}): {reason}") from error
        return out

    def read_parts(self, parts: Sequence[Part], out: torch.Tensor) -> torch.Tensor:
        """Fill `out` with `parts`, one above the other by rows."""
        row = 0
        for part in parts:
            self.read(part.key, out[row : row + part.shape[0]], part.index)
            row += part.shape[0]
        return out


def _dcp_metadata(tensor: Tensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, tensor.spec.dtype)),
        size=torch.Size(tensor.spec.shape),
        chunks=[ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks],
    )
