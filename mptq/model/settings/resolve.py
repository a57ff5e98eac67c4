"""Where the architecture is found: a ladder of sources, of which the highest that knows a setting counts. No torch.

`--config`, `--hf-config`, the run config beside the weights, the training run's arguments, the tensors' shapes.
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
    """What a checkpoint says of its model; `mptq.checkpoint.index.Checkpoint` is one."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The run config beside the weights, as plain data; empty where there is none."""

    @property
    def config_source(self) -> str:
        """Where the run config was found."""

    @property
    def args(self) -> Mapping[str, Any]:
        """The training run's arguments; empty where there are none."""

    @property
    def args_source(self) -> str:
        """Where the arguments were found."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors."""


def resolve(
    checkpoint: Described, config: Sequence[str] = (), hf_config: Path | None = None, tokenizer: Path | None = None
) -> Settings:
    """What is known of the architecture of a checkpoint's model, each setting with its source.

    `config` are the user's `key=value`, `hf_config` is a Hugging Face directory or config.json, `tokenizer` a directory that
    stands for the tokenizer which the checkpoint names. Raises OptionError for an unknown key or a value of the wrong kind,
    CheckpointError for a config.json that cannot be read.
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
