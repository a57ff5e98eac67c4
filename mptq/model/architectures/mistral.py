"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import decoder, window
from mptq.model.architectures.config_type import DECODER, LLAMA, ConfigType
from mptq.model.architectures.family import Family
from mptq.model.config import ModelConfig


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return decoder(config) | {"sliding_window": window(config)}


FAMILY = Family(
    name="Mistral",
    config_class="MistralConfig",
    architecture="MistralForCausalLM",
    config_json=_config_json,
    config_types={"mistral": ConfigType(fields=f"{DECODER} sliding_window", settings=LLAMA, derived="head_dim")},
    accepts={"window": ("every layer",)},
)
