"""Merges the sources of the architecture; each setting comes from the first source that has it. No torch.

In order: `--config`, `--hf-config`, the run config saved with the weights, the training arguments, the tensor shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mptq.model.settings.from_hf_config import TOKENIZER, from_hf_config, from_tokenizer
from mptq.model.settings.from_megatron_args import from_args
from mptq.model.settings.from_options import from_options
from mptq.model.settings.from_run_config import from_document
from mptq.model.settings.from_tensor_shapes import from_tensors
from mptq.model.settings.settings import OPTIONS, SHAPES, Settings, SettingsSource, merge
from mptq.types import TensorSpec


class Described(Protocol):
    """A checkpoint's description of its model; `mptq.checkpoint.index.Checkpoint` implements it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The run config saved with the weights, as plain data; empty if there is none."""

    @property
    def config_source(self) -> str:
        """The source of the run config."""

    @property
    def args(self) -> Mapping[str, Any]:
        """The training arguments; empty if there are none."""

    @property
    def args_source(self) -> str:
        """The source of the arguments."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The name, dtype and shape of each tensor, by name."""


def resolve(
    checkpoint: Described, config: Sequence[str] = (), hf_config: Path | None = None, tokenizer: Path | None = None
) -> Settings:
    """Returns the known settings of a checkpoint's model, each with its source.

    `config` has the user's `key=value` settings, `hf_config` is a Hugging Face directory or config.json, and
    `tokenizer` a directory that replaces the tokenizer that the checkpoint names. Raises OptionError for an unknown key
    or a value of the wrong type, CheckpointError for a config.json that is unreadable or not understood.
    """
    rungs = list(_rungs(checkpoint, config, hf_config))
    named = tokenizer or merge(rungs).get("tokenizer_model")
    return merge([*rungs, SettingsSource(TOKENIZER, from_tokenizer(named))])


def _rungs(checkpoint: Described, config: Sequence[str], hf_config: Path | None) -> Iterator[SettingsSource]:
    yield SettingsSource(OPTIONS, from_options(config), overrides=True)
    if hf_config is not None:
        fields, file = from_hf_config(hf_config)
        yield SettingsSource(file, fields)
    yield SettingsSource(checkpoint.config_source, from_document(checkpoint.config))
    yield SettingsSource(checkpoint.args_source, from_args(checkpoint.args))
    yield SettingsSource(SHAPES, from_tensors(checkpoint.specs))
