"""DeepSeek-V2 and DeepSeek-V3 (and Kimi-K2): multi-latent attention and experts in groups."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import activation, expert_groups, rope, routed_scaling
from mptq.model.architectures.config_type import EXPERTS, LLAMA, ROTARY, ROUTING, SIGMOID, SIZES, ConfigType
from mptq.model.architectures.family import EITHER, Family
from mptq.model.config import ModelConfig
from mptq.model.features import by_the_best


def _config_json(config: ModelConfig) -> dict[str, Any]:
    sizes = config.latent
    assert sizes is not None
    return (
        rope(config)
        | expert_groups(config)
        | {
            "num_key_value_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_hidden_size,
            "hidden_act": activation(config),
            "rms_norm_eps": config.norm_epsilon,
            "attention_bias": False,
            "mlp_bias": False,
            "q_lora_rank": sizes.q_rank or None,
            "kv_lora_rank": sizes.kv_rank,
            "qk_nope_head_dim": sizes.qk_dim,
            "qk_rope_head_dim": sizes.rotary_dim,
            "v_head_dim": sizes.v_dim,
            "moe_intermediate_size": config.moe_ffn_hidden_size,
            "n_routed_experts": config.num_experts,
            "n_shared_experts": config.shared_ffn_hidden_size // config.moe_ffn_hidden_size,
            "num_experts_per_tok": config.moe_topk,
            "routed_scaling_factor": routed_scaling(config),
            "first_k_dense_replace": sum(kind.ffn == "mlp" for kind in config.kinds),
            "moe_layer_freq": 1,
        }
    )


def _v2_config_json(config: ModelConfig) -> dict[str, Any]:
    return _config_json(config) | {
        "topk_method": "group_limited_greedy" if config.expert_groups else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def _v3_config_json(config: ModelConfig) -> dict[str, Any]:
    return _config_json(config) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
    }


_NAMES = {
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "mlp.shared_experts": "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj",
}
_FUSED = {
    "gate_up_proj": "gate_proj up_proj",
    "fused_qkv_a_proj": "q_a_proj kv_a_proj_with_mqa",
}
_ACCEPTS: dict[str, tuple[Any, ...]] = {
    "attention": ("multi-latent",),
    "qk norm": (True,),
    "rope scaling": ("none", "yarn"),
    "experts": ("every layer", "all but the first layers"),
    "shared": ("yes",),
    "router scale": EITHER,
}
_FIELDS = (
    f"{SIZES} {ROTARY} hidden_act rms_norm_eps {EXPERTS} {ROUTING} topk_method "
    "first_k_dense_replace num_nextn_predict_layers q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
)
_SETTINGS = {**LLAMA, "multi_latent_attention": True, "qk_layernorm": True}
_IGNORED = "head_dim qk_head_dim num_key_value_heads"

_V2_CONFIG = ConfigType(
    fields=_FIELDS,
    settings={**_SETTINGS, "moe_router_pre_softmax": True},
    fixed={
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    ignored=_IGNORED,
    derived="",
)
_V3_CONFIG = ConfigType(
    fields=_FIELDS,
    settings={**_SETTINGS, **SIGMOID},
    fixed={
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
    },
    ignored=_IGNORED,
    derived="",
)

V2 = Family(
    name="DeepSeek-V2",
    config_class="DeepseekV2Config",
    architecture="DeepseekV2ForCausalLM",
    config_json=_v2_config_json,
    config_types={"deepseek_v2": _V2_CONFIG},
    accepts=_ACCEPTS
    | {
        "router": ("softmax of all",),
        "groups": ("none", by_the_best(1)),
        "topk": ("one", "several"),
    },
    # The published DeepSeek-V2 needs this: for 6 experts of 3 groups, megatron-core uses the best 2 of each group.
    approximates={
        "groups": (
            tuple(map(by_the_best, range(2, 65))),
            "transformers and engines choose DeepSeek-V2's expert groups by the best expert of each group, as the published "
            "model does, but megatron-core by the sum of the best topk / group_topk experts: some tokens are routed to other "
            "experts than in training with Megatron and in the fidelity figures",
        )
    },
    names=_NAMES,
    fused=_FUSED,
    latent_epsilon=1e-6,
)
V3 = Family(
    name="DeepSeek-V3",
    config_class="DeepseekV3Config",
    architecture="DeepseekV3ForCausalLM",
    config_json=_v3_config_json,
    config_types={"deepseek_v3": _V3_CONFIG, "kimi_k2": _V3_CONFIG},
    accepts=_ACCEPTS
    | {
        "router": ("sigmoid",),
        "expert bias": (True,),
        "groups": ("none", by_the_best(2)),
        "topk": ("several",),
    },
    names=_NAMES,
    fused=_FUSED,
    latent_epsilon=1e-6,
)
