"""The Megatron form: torch_dist with one key per layer and ModelOpt's state, which megatron-core + ModelOpt restores.

Keys and shapes are those of a model that ModelOpt quantized and compressed and megatron-core saved (one key per layer and
expert, gated fc1 split into `weight_w` and `weight_v`, quantizer tensors, `_extra_state/shard_0_1`). Written with torch's own
DCP, one file a layer.
"""

from __future__ import annotations

import copyreg
import io
import json
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from mptq.types import LayerOutput


class _Planner(DefaultSavePlanner):
    """Byte items are serialized already; everything else is as in torch."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def transform_object(self, write_item: WriteItem, object: Any) -> io.BytesIO:  # noqa: A002 (torch's name)
        return object  # type: ignore[no-any-return]


class _MetadataPickler(pickle.Pickler):
    """Leaves out the strides that torch 2.15 added to TensorProperties: torch 2.14 and earlier cannot read them."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not TensorProperties:
            return NotImplemented
        return copyreg.__newobj__, (TensorProperties,), value.__getstate__()[:5]  # type: ignore[attr-defined]


class MegatronWriter:
    """Writes `iter_*` under `directory`, a checkpoint root. Memory: the tensors of one call to `write`."""

    format = "megatron"

    def __init__(self, directory: Path, iteration: int | None) -> None:
        self.root = directory
        self.tracker = str(iteration) if iteration is not None else "release"
        self.directory = directory / (f"iter_{iteration:07d}" if iteration is not None else "release")
        self.directory.mkdir(parents=True)
        self._storage = FileSystemWriter(self.directory, thread_count=1)
        self._storage.set_up_storage_writer(is_coordinator=True)
        self._metadata = Metadata(state_dict_metadata={})
        self._metadata.storage_data = {}

    def write(self, output: LayerOutput) -> list[Path]:
        """Write a layer's tensors and byte items into a file of their own; return it."""
        state: dict[str, Any] = dict(output.tensors[self.format])
        state |= {name: io.BytesIO(blob) for name, blob in output.blobs.items()}
        planner = _Planner()
        planner.set_up_planner(state, None, is_coordinator=True)
        plans, metadata = create_default_global_save_plan([planner.create_local_plan()])
        plan = planner.finish_plan(SavePlan(plans[0].items, storage_data=_StoragePrefix(f"__{output.index}_")))
        results = self._storage.write_data(plan, planner).wait()
        self._metadata.state_dict_metadata.update(metadata.state_dict_metadata)
        self._metadata.storage_data |= {result.index: result.storage_data for result in results}
        return [self.directory / f"__{output.index}_0.distcp"]

    def finish(self, modelopt_state: bytes, common: bytes | None) -> list[Path]:
        """Write the metadata, ModelOpt's state and the training run's arguments (`common.pt` as it was); return them."""
        # Not by FileSystemWriter.finish, which adds the path and a random id: the same input must give the same bytes.
        with (self.directory / ".metadata").open("wb") as file:
            _MetadataPickler(file).dump(self._metadata)
        config = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        nested = self.directory / "modelopt_state"
        nested.mkdir()
        files = {
            nested / "common.pt": modelopt_state,
            nested / "metadata.json": config.encode(),
            self.directory / "metadata.json": config.encode(),
            self.root / "latest_checkpointed_iteration.txt": self.tracker.encode(),
        }
        if common is not None:
            files[self.directory / "common.pt"] = common
        for path, content in files.items():
            path.write_bytes(content)
        return [self.directory / ".metadata", *files]

    def abort(self) -> None:
        """Nothing stays open between calls."""
