"""Which settings mptq supports: defaults, settings that it refuses, and settings that its forward pass lacks. No torch.

Keys are settings (settings.py) under megatron-core's names; an absent setting has its default.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from mptq.model.settings.settings import ACTIVATIONS
from mptq.model.settings.values import short

DEFAULTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "activation_func": "gelu",
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling_factor": 8.0,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_rotary_scaling_factor": 1.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32,
    "yarn_beta_slow": 1,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "softmax_type": "vanilla",
    "mamba_state_dim": 128,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
}
"""megatron-core's default of each setting, unless that is None or off.

Source: megatron/core/transformer/transformer_config.py, models/gpt/gpt_model.py; `rope_type` and below are MLA's.
"""

_OFF: Container[Any] = (False, None, 0)


class _Plain:
    """The classes of Megatron-Bridge and NeMo 2 that build a plain megatron-core model from the settings alone.

    Others do more without a setting for it: Gemma's scale the embedding, vision and speech models add encoders, and
    some use their own modules in the layers. A name may end in a size, as in Llama3ModelProvider8B.
    Source: megatron/bridge/models, nemo/collections/llm/gpt/model.
    """

    name = re.compile(
        r"(GPT|MLA|MCore(GPT|Mamba)?|Hybrid|Mamba|SSM|Llama(2|3|31|32)?|CodeLlama|Mistral|MistralSmall3|Mixtral"
        r"|Qwen(2|25|3)?(MoE)?|DeepSeek(V2|V2Lite|V3)?|Moonlight|Kimi(K2)?|Nemotron(3|4|H|Nano\w*)?|OlMoE|Phi3|Starcoder2?|GPTOSS"
        r"|GLM45(Air)?)"
        r"(Model|ModelProvider|ModelConfig|Provider|Config)([\d_]\w*)?"
    )

    def __contains__(self, value: object) -> bool:
        return value is None or self.name.fullmatch(str(value)) is not None


LAYER_SPECS = """
default_layer_spec transformer_engine_layer_spec local_layer_spec modelopt_transformer_layer_spec quantization_layer_spec
get_gpt_decoder_block_spec get_gpt_layer_with_transformer_engine_spec get_gpt_layer_local_spec get_gpt_layer_with_inference_spec
get_gpt_modelopt_spec get_transformer_block_with_experimental_attention_variant_spec local
"""
"""Functions that build megatron-core's own layers from the settings alone: megatron-core's (megatron/core/models/gpt,
megatron/core/post_training/modelopt), the defaults of Megatron-Bridge and NeMo 2 (gpt_provider.py, gpt/model/base.py),
and Megatron-LM's `--spec local`."""
STACK_SPECS = """
get_default_hybrid_stack_spec transformer_engine_hybrid_stack_spec modelopt_hybrid_stack_spec get_hybrid_stack_modelopt_spec
get_default_mamba_stack_spec transformer_engine_mamba_stack_spec modelopt_mamba_stack_spec get_mamba_stack_modelopt_spec
hybrid_stack_spec hybrid_inference_stack_spec mamba_stack_spec mamba_inference_stack_spec default_mamba_stack_spec
<lambda> ModuleSpec
"""
"""The same for hybrid models; the default is a lambda in Megatron-Bridge up to 0.3, and the spec itself in NeMo 2."""
_LAYERS = (None, *LAYER_SPECS.split()), "a layer spec that mptq does not know"
_STACK = (None, *STACK_SPECS.split()), "a layer spec that mptq does not know"
DECLARED = {
    "provider": "GPTModelProvider",
    "transformer_layer_spec": "default_layer_spec",
    "hybrid_stack_spec": "hybrid_stack_spec",
    "mamba_stack_spec": "mamba_stack_spec",
}
"""Setting of a class or function -> the known one that a user can declare it equivalent to."""

REFUSED: dict[str, tuple[Container[Any], str]] = {
    "provider": (_Plain(), "a model class that may do more than its settings specify"),
    "transformer_layer_spec": _LAYERS,
    "hybrid_stack_spec": _STACK,
    "mamba_stack_spec": _STACK,
    "use_transformer_engine_full_layer_spec": (_OFF, "Transformer Engine's own layers, whose tensors have other names"),
    "enable_hyper_connections": (_OFF, "hyper-connections"),
    "moe_n_hash_layers": (_OFF, "layers that route tokens by their ids"),
    "attention_output_gate": (_OFF, "an attention output gate"),
    "experimental_attention_variant": ((None,), "an experimental attention variant"),
    "linear_attention_freq": ((None,), "linear attention"),
    "heterogeneous_block_specs": (_OFF, "heterogeneous layers"),
    "heterogeneous_layers_config_path": ((None,), "heterogeneous layers"),
    "heterogeneous_layers_config_encoded_json": ((None, ""), "heterogeneous layers"),
    "rope_low_freq_factor": ((None, 1), "rotary scaling that is not Llama 3's"),
    "rope_high_freq_factor": ((None, 4), "rotary scaling that is not Llama 3's"),
    "rope_original_max_position_embeddings": ((None, 8192), "rotary scaling that is not Llama 3's"),
    "moe_latent_size": (_OFF, "latent projections around the experts"),
    "moe_mlp_glu_interleave_size": (_OFF, "interleaved gate and up projections"),
    "moe_shared_expert_glu_interleave_size": (_OFF, "interleaved gate and up projections"),
}
"""Setting -> (values for which mptq knows the tensors, description of any other value)."""

NOT_RUN: dict[str, tuple[Container[Any], str]] = {
    "activation_func": ((*ACTIVATIONS, None), "an unknown activation function"),
    "hybrid_layer_pattern": ((None,), "Mamba layers, which need a GPU and mamba-ssm"),
    "position_embedding_type": (("rope", "learned_absolute", "none", "yarn", None), "a position embedding not for text"),
    "attention_chunk_size": (_OFF, "chunked attention"),
    "interleaved_attn_pattern": ((None,), "local and global attention by turns"),
    "query_pre_attn_scalar": ((None,), "a scale of the attention scores that is not by the heads' size"),
    "attn_logit_softcapping": (_OFF, "a soft cap on attention scores"),
    "final_logit_softcapping": (_OFF, "a soft cap on logits"),
    "use_mup": (_OFF, "maximal update parametrization"),
    "apply_residual_connection_post_layernorm": (_OFF, "residuals taken after the norm"),
    "fp32_residual_connection": (_OFF, "residuals in float32"),
    "moe_router_load_balancing_type": (
        ("none", "aux_loss", "seq_aux_loss", "global_aux_loss", "quantile_balancing", None),
        "load balancing that is part of the routing",
    ),
    "moe_router_force_load_balancing": (_OFF, "random routing"),
    "moe_router_force_biased": ((None,), "random routing"),
    "moe_router_topk_limited_devices": (_OFF, "device-limited routing"),
    # A negative factor means no limit.
    "moe_expert_capacity_factor": ((None, -1), "a capacity limit of experts"),
    "moe_expert_rank_capacity_factor": ((None, -1), "a capacity limit of experts"),
    "moe_token_dropping": (_OFF, "token dropping"),
    "moe_apply_probs_on_input": (_OFF, "router weights applied to the experts' input"),
}
"""The same for mptq's forward pass: the settings of megatron-core that affect the output of a layer.

Losses, dispatchers, fused kernels and the input jitter of training do not affect what is stored or computed.
"""


def obstacles(table: Mapping[str, tuple[Container[Any], str]], settings: Mapping[str, Any]) -> list[str]:
    """Describes the `settings` that `table` does not accept: the feature, and the setting with its value."""
    return [
        f"{meaning} ({name}={short(settings.get(name))})"
        for name, (accepted, meaning) in table.items()
        if not _accepts(accepted, settings.get(name))
    ]


def remedy(settings: Mapping[str, Any]) -> str:
    """Returns what to do if unknown classes or functions are the only obstacle; empty otherwise."""
    found = [key for key, (accepted, _) in REFUSED.items() if not _accepts(accepted, settings.get(key))]
    if not set(found) <= set(DECLARED):
        return ""
    options = " ".join(f"--config {key}={DECLARED[key]}" for key in found)
    return f": if that is your own code and builds megatron-core's model from these settings, pass {options}"


def _accepts(accepted: Container[Any], value: Any) -> bool:
    return all(item in accepted for item in value) if isinstance(value, list | tuple) and value else value in accepted
