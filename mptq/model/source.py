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
    """Selects a checkpoint of a root, and holds the user's settings for its architecture.

    `iteration` selects one of the root's, None for the latest. `config` has `key=value` settings and `hf_config` is a
    Hugging Face directory or config.json; both take precedence over the checkpoint. `tokenizer` is a directory that
    replaces the tokenizer that the checkpoint names.
    """

    iteration: int | None = None
    config: tuple[str, ...] = ()
    hf_config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its index, its model, the place of each inner tensor, and the known generation settings."""

    checkpoint: Checkpoint
    model: ModelConfig
    places: Mapping[str, tuple[TensorSlice, ...]]
    generation: tuple[GenerationSource, ...] = ()

    @property
    def skipped(self) -> dict[str, str]:
        """Keys of the checkpoint that are in no output, with the reason."""
        keys = [*self.checkpoint.tensors, *self.checkpoint.blobs]
        return skipped(keys)

    def dtype(self, inner: str) -> str:
        """Returns the dtype in which the checkpoint stores an inner tensor."""
        return self.checkpoint.tensors[self.places[inner][0].key].spec.dtype


def open_source(path: Path, options: SourceOptions | None = None) -> Source:
    """Opens the checkpoint at `path` and determines its model.

    Raises CheckpointError (also if there are no weights to quantize), UnsupportedModelError, or OptionError for bad
    `options`.
    """
    options = options or SourceOptions()
    checkpoint = open_checkpoint(path, options.iteration)
    require_weights(checkpoint)
    specs = checkpoint.specs
    model = model_config(resolve(checkpoint, options.config, options.hf_config, options.tokenizer), specs)
    saved = GenerationSource(checkpoint.config_source, generation_fields(checkpoint.config), whole=True)
    given = () if options.hf_config is None else generation_sources(options.hf_config)
    return Source(checkpoint, model, locate(specs, model), (*((saved,) if saved.fields else ()), *given))
