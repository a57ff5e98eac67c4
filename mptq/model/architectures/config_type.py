"""What mptq knows of one `model_type` of config.json, as one record, and what many of them share. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

type Fields = Mapping[str, Any]
"""Fields of a config.json that say something, validated (settings/hf_config_fields.py)."""

UNSAID = object()
"""A setting that a field says nothing of after all."""


@dataclass(frozen=True, kw_only=True)
class ConfigType:
    """One `model_type`.

    Attributes:
        fields: Fields that transformers' code of it reads.
        settings: Settings (settings.py) where no field says otherwise.
        fixed: Fields that no setting expresses -> the values at which the model is what the settings say.
        ignored: Fields that its configs have and that change nothing.
        derived: Fields that follow from others where they are absent; other types have constants there.
        refine: Settings that follow from the fields, and from the settings that they say, in a way of its own.

    """

    fields: str
    settings: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: str = ""
    derived: str = "head_dim num_key_value_heads"
    refine: Callable[[Fields, Mapping[str, Any]], dict[str, Any]] = lambda fields, settings: {}


SIZES = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size max_position_embeddings tie_word_embeddings"
)
ROTARY = "rope_theta rope_scaling rope_parameters"
DECODER = f"{SIZES} {ROTARY} num_key_value_heads head_dim hidden_act rms_norm_eps layer_types"
WINDOW = "sliding_window use_sliding_window max_window_layers"
EXPERTS = "num_local_experts num_experts n_routed_experts num_experts_per_tok moe_intermediate_size norm_topk_prob"
ROUTING = "n_shared_experts routed_scaling_factor n_group topk_group"
SPARSE = f"{EXPERTS} shared_expert_intermediate_size decoder_sparse_step mlp_only_layers"

LLAMA: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
GPT: Mapping[str, Any] = {**LLAMA, "normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True}
LEARNED_POSITIONS: Mapping[str, Any] = {**GPT, "position_embedding_type": "learned_absolute"}
SIGMOID: Mapping[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
