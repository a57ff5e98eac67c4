"""Describes how mptq reads one `model_type` of config.json, and holds values that many of them share. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

type Fields = Mapping[str, Any]
"""Validated fields of a config.json, without those that are null (settings/hf_config_fields.py)."""

UNSAID = object()
"""Value of a setting that `refine` removes."""


@dataclass(frozen=True, kw_only=True)
class ConfigType:
    """One `model_type`.

    Attributes:
        fields: Fields that the code of this type in transformers reads.
        settings: Settings (settings.py) that hold unless a field overrides them.
        fixed: Fields that no setting can express -> the values for which the settings describe the model fully.
        ignored: Fields that configs of this type can have and that change nothing.
        derived: Fields that are derived from others if absent; in other types their default is a constant.
        refine: Returns further settings for this type, given the fields and the settings from them.

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
