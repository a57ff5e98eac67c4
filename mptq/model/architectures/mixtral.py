"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mptq.model.architectures.config_json import decoder, window
from mptq.model.architectures.config_type import DECODER, EXPERTS, LLAMA, UNSAID, ConfigType, Fields
from mptq.model.architectures.family import Family
from mptq.model.config import ModelConfig


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return decoder(config) | {
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.moe_topk,
        "sliding_window": window(config),
    }


def _expert_width(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `intermediate_size` as the width of an expert: no layer has any other MLP."""
    if "intermediate_size" not in fields:
        return {}
    return {"ffn_hidden_size": UNSAID, "moe_ffn_hidden_size": fields["intermediate_size"]}


FAMILY = Family(
    name="Mixtral",
    config_class="MixtralConfig",
    architecture="MixtralForCausalLM",
    config_json=_config_json,
    config_types={
        "mixtral": ConfigType(
            fields=f"{DECODER} {EXPERTS} sliding_window",
            settings={**LLAMA, "moe_router_pre_softmax": False},
            derived="head_dim",
            refine=_expert_width,
        )
    },
    accepts={"experts": ("every layer",), "window": ("no layer", "every layer")},
    names={
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts": "block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3 block_sparse_moe.experts.{}.w2",
    },
)
