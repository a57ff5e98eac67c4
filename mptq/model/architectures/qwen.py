"""Qwen2 and Qwen2.5, which have a QKV bias, and Qwen3, which has QK norms instead; dense and with experts."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import decoder
from mptq.model.architectures.config_type import DECODER, LLAMA, SPARSE, WINDOW, ConfigType
from mptq.model.architectures.family import EITHER, SOME_EXPERTS, Family
from mptq.model.config import ModelConfig


def _dense(config: ModelConfig) -> dict[str, Any]:
    return decoder(config) | {"use_sliding_window": False, "sliding_window": None, "attention_bias": False}


def _sparse(config: ModelConfig) -> dict[str, Any]:
    return _dense(config) | {
        "qkv_bias": config.features["qkv bias"],
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": config.shared_ffn_hidden_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.moe_topk,
        "norm_topk_prob": config.features["router"] == "softmax of the chosen",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(config.kinds) if kind.ffn == "mlp"],
    }


_BIASED = {**LLAMA, "add_qkv_bias": True}
_NORMED = {**LLAMA, "qk_layernorm": True}
_ROUTED = {
    "experts": SOME_EXPERTS,
    "router": ("softmax of all", "softmax of the chosen"),
    "topk": ("one", "several"),
}

QWEN2 = Family(
    name="Qwen2",
    config_class="Qwen2Config",
    architecture="Qwen2ForCausalLM",
    config_json=_dense,
    config_types={
        "qwen2": ConfigType(fields=f"{DECODER} {WINDOW}", settings=_BIASED, ignored="attention_bias", derived="head_dim")
    },
    accepts={"qkv bias": (True,), "head_dim": (False,)},
)
QWEN2_MOE = Family(
    name="Qwen2-MoE",
    config_class="Qwen2MoeConfig",
    architecture="Qwen2MoeForCausalLM",
    config_json=_sparse,
    config_types={
        "qwen2_moe": ConfigType(
            fields=f"{DECODER} {WINDOW} {SPARSE} qkv_bias",
            settings={**_BIASED, "moe_shared_expert_gate": True},
            ignored="attention_bias",
            derived="head_dim",
        )
    },
    accepts={"qkv bias": EITHER, "head_dim": (False,), "shared": ("gated",)} | _ROUTED,
)
QWEN3 = Family(
    name="Qwen3",
    config_class="Qwen3Config",
    architecture="Qwen3ForCausalLM",
    config_json=_dense,
    config_types={"qwen3": ConfigType(fields=f"{DECODER} {WINDOW}", settings=_NORMED, derived="")},
    accepts={"qk norm": (True,)},
)
QWEN3_MOE = Family(
    name="Qwen3-MoE",
    config_class="Qwen3MoeConfig",
    architecture="Qwen3MoeForCausalLM",
    config_json=_sparse,
    config_types={
        "qwen3_moe": ConfigType(fields=f"{DECODER} {WINDOW} {SPARSE}", settings=_NORMED, ignored="qkv_bias", derived="head_dim")
    },
    accepts={"qk norm": (True,)} | _ROUTED,
)
