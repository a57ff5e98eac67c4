"""An opened checkpoint and the model in it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mptq.checkpoint.contents import require_weights
from mptq.checkpoint.index import Checkpoint, open_checkpoint
from mptq.model.build import model_config
from mptq.model.checkpoint_keys import locate, skipped
from mptq.model.config import ModelConfig
from mptq.model.generation import GenerationSource
from mptq.model.settings.from_hf_config import generation_sources
from mptq.model.settings.from_run_config import generation_fields
from mptq.model.settings.resolve import resolve
from mptq.types import TensorSlice


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Which checkpoint of a root is meant, and what the user says of its architecture.

    `iteration` is one of the root's, None for its latest. `config` are `key=value`, `hf_config` is a Hugging Face directory or
    config.json; both stand above what the checkpoint says. `tokenizer` is a directory in the place of the tokenizer that the
    checkpoint names.
    """

    iteration: int | None = None
    config: tuple[str, ...] = ()
    hf_config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its index, its model, where each inner tensor is, and what it or the user says of generation."""

    checkpoint: Checkpoint
    model: ModelConfig
    places: Mapping[str, tuple[TensorSlice, ...]]
    generation: tuple[GenerationSource, ...] = ()

    @property
    def skipped(self) -> dict[str, str]:
        """Keys of the checkpoint that no output has, with the reason."""
        keys = [*self.checkpoint.tensors, *self.checkpoint.blobs]
        return skipped(keys)

    def dtype(self, inner: str) -> str:
        """The dtype in which the checkpoint stores an inner tensor."""
        return self.checkpoint.tensors[self.places[inner][0].key].spec.dtype


def open_source(path: Path, options: SourceOptions | None = None) -> Source:
    """Open the checkpoint at `path` and find its model.

    Raises CheckpointError, also for one without weights to quantize, UnsupportedModelError, or OptionError for bad `options`.
    """
    options = options or SourceOptions()
    checkpoint = open_checkpoint(path, options.iteration)
    require_weights(checkpoint)
    specs = checkpoint.specs
    model = model_config(resolve(checkpoint, options.config, options.hf_config, options.tokenizer), specs)
    told = GenerationSource(checkpoint.config_source, generation_fields(checkpoint.config), whole=True)
    beside = () if options.hf_config is None else generation_sources(options.hf_config)
    return Source(checkpoint, model, locate(specs, model), (*((told,) if told.fields else ()), *beside))
