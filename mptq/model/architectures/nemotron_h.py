"""Nemotron-H: each layer is either Mamba, attention, an MLP or experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mptq.model.architectures.config_json import activation, expert_groups, routed_scaling
from mptq.model.architectures.config_type import EXPERTS, LLAMA, ROUTING, SIGMOID, SIZES, UNSAID, ConfigType, Fields
from mptq.model.architectures.family import EITHER, SOME_EXPERTS, Family
from mptq.model.config import ModelConfig
from mptq.model.features import by_the_best

_BLOCKS = {("mamba", ""): "mamba", ("attention", ""): "attention", ("", "mlp"): "mlp", ("", "moe"): "moe"}
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def _config_json(config: ModelConfig) -> dict[str, Any]:
    heads = int(config.get("mamba_num_heads") or 2 * config.hidden_size // config.get("mamba_head_dim"))
    return {
        "layers_block_type": [_BLOCKS[kind.mixer, kind.ffn] for kind in config.kinds],
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "mlp_hidden_act": activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "ssm_state_size": config.get("mamba_state_dim"),
        "mamba_num_heads": heads,
        "mamba_head_dim": config.get("mamba_head_dim"),
        "n_groups": config.get("mamba_num_groups"),
    } | (_experts(config) if config.num_experts else {})


def _experts(config: ModelConfig) -> dict[str, Any]:
    return expert_groups(config) | {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.moe_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.shared_ffn_hidden_size,
        "n_shared_experts": 1,
        "routed_scaling_factor": routed_scaling(config),
        "norm_topk_prob": True,
    }


def _layers(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the layer pattern. If no layer has experts, the expert fields are meaningless and are removed."""
    kinds = fields.get("layers_block_type")
    pattern = "".join(_LETTERS[kind] for kind in kinds) if kinds else fields.get("hybrid_override_pattern")
    if not pattern:
        return {}
    found: dict[str, Any] = {"hybrid_layer_pattern": pattern, "is_hybrid_model": True, "num_layers": len(pattern)}
    if "E" in pattern:
        return found | dict(SIGMOID)
    dead = [key for key in settings if key.startswith("moe_") or key == "num_moe_experts"]
    return found | dict.fromkeys(dead, UNSAID)


FAMILY = Family(
    name="Nemotron-H",
    config_class="NemotronHConfig",
    architecture="NemotronHForCausalLM",
    config_json=_config_json,
    config_types={
        "nemotron_h": ConfigType(
            fields=f"{SIZES} {EXPERTS} {ROUTING} layers_block_type hybrid_override_pattern ssm_state_size mamba_num_heads "
            "mamba_head_dim n_groups num_key_value_heads head_dim attention_head_dim mlp_hidden_act layer_norm_epsilon "
            "moe_shared_expert_intermediate_size num_nextn_predict_layers",
            settings={**LLAMA, "gated_linear_unit": False, "position_embedding_type": "none"},
            fixed={
                "use_bias": (False,),
                "use_conv_bias": (True,),
                "mamba_proj_bias": (False,),
                "mamba_hidden_act": ("silu",),
                "conv_kernel": (4,),
                "time_step_limit": ([0, float("inf")], [0, {"__float__": "Infinity"}]),
                "residual_in_fp32": (False,),
                "moe_latent_size": (),
                "norm_topk_prob": (True,),
            },
            ignored="rms_norm_eps rope_theta rope_scaling num_query_groups expand chunk_size time_step_rank time_step_min "
            "time_step_max time_step_floor use_mamba_kernels mamba_ssm_cache_dtype rescale_prenorm_residual "
            "num_logits_to_keep moe_shared_expert_overlap mtp_layers_block_type mtp_hybrid_override_pattern",
            derived="",
            refine=_layers,
        )
    },
    accepts={
        "hybrid": (True,),
        "position": ("none",),
        "mlp": ("squared_relu",),
        "experts": (*SOME_EXPERTS, "no layer"),
        "router": ("sigmoid",),
        "expert bias": (True,),
        "groups": ("none", by_the_best(2)),
        "router scale": EITHER,
        "shared": ("yes",),
    },
    names={
        "norm": "norm",
        "mixer.in_proj": "mixer.in_proj",
        "mixer.out_proj": "mixer.out_proj",
        "mixer": "mixer",
        "mixer.norm": "mixer.norm",
        "mixer.conv1d": "mixer.conv1d",
        "input_layernorm": "norm",
        "pre_mlp_layernorm": "norm",
        "self_attention.linear_qkv": "mixer.q_proj mixer.k_proj mixer.v_proj",
        "self_attention.linear_proj": "mixer.o_proj",
        "self_attention.core_attention": "mixer",
        "mlp": "mixer.gate_proj mixer.up_proj mixer.down_proj",
        "mlp.router": "mixer.gate",
        "mlp.experts": "mixer.experts.{}.gate_proj mixer.experts.{}.up_proj mixer.experts.{}.down_proj",
        "mlp.shared_experts": "mixer.shared_experts.gate_proj mixer.shared_experts.up_proj mixer.shared_experts.down_proj",
        "embedding.word_embeddings": "backbone.embeddings",
        "decoder.final_norm": "backbone.norm_f",
    },
    layer="backbone.layers.{}.",
)
