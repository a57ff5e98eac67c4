"""Llama and models with its architecture (SmolLM, Yi)."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import decoder
from mptq.model.architectures.config_type import DECODER, LLAMA, ConfigType
from mptq.model.architectures.family import Family
from mptq.model.config import ModelConfig


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return decoder(config) | {"attention_bias": False, "mlp_bias": False}


FAMILY = Family(
    name="Llama",
    config_class="LlamaConfig",
    architecture="LlamaForCausalLM",
    config_json=_config_json,
    config_types={"llama": ConfigType(fields=DECODER, settings=LLAMA)},
)
