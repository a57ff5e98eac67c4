"""megatron-core's config of a model, from mptq's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from mptq.errors import UnsupportedModelError
from mptq.model.config import YARN
from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

if TYPE_CHECKING:
    from mptq.model.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}
"""Values of the setting `activation_func`."""
_PLAIN = (
    "normalization",
    "layernorm_zero_centered_gamma",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "rotary_interleaved",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "softmax_type",
    "softmax_scale",
    "apply_query_key_layer_scaling",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "moe_router_topk",
    "moe_router_dtype",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_gate",
)
"""Settings that are passed to megatron-core unchanged: those that affect the output of a layer."""
_LATENT = ("rope_type", "rotary_base", "rotary_percent", *(name for name in YARN if name != "correction_range_round_to_int"))
"""The same for multi-latent attention, which computes its own rotary embedding."""


@cache
def transformer_config(config: ModelConfig) -> TransformerConfig:
    """Returns megatron-core's config of the model, without fused kernels, dropout or random initialization.

    Raises UnsupportedModelError, with megatron-core's message, for a combination of settings that it rejects.
    """
    try:
        return _transformer_config(config)
    except (ValueError, AssertionError) as error:  # what TransformerConfig.__post_init__ raises
        reason = " ".join(str(error).split()) or "unsupported combination of settings"
        raise UnsupportedModelError(f"megatron-core cannot build this model: {reason}") from error


def _transformer_config(config: ModelConfig) -> TransformerConfig:
    dtype = getattr(torch, config.dtype)
    fields = {key: config.get(key) for key in _PLAIN if config.get(key) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options that mptq does not set
        made = (MLATransformerConfig if config.latent else TransformerConfig)(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            kv_channels=config.head_dim,
            layernorm_epsilon=config.norm_epsilon,
            activation_func=ACTIVATIONS[config.get("activation_func")],
            attention_dropout=0.0,
            hidden_dropout=0.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            perform_initialization=False,
            use_cpu_initialization=True,
            apply_rope_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
            transformer_impl="local",
            **fields,
            **_latent_options(config),
            **_moe_options(config),
        )
    if config.yarn and not config.latent:
        for name, value in config.yarn.items():
            setattr(made, f"yarn_{name}", value)  # read by megatron-core's attention, but not fields
    return made


def _latent_options(config: ModelConfig) -> dict[str, Any]:
    if config.latent is None:
        return {}
    sizes = config.latent
    return {key: config.get(key) for key in _LATENT} | {
        "multi_latent_attention": True,
        "q_lora_rank": sizes.q_rank or None,
        "kv_lora_rank": sizes.kv_rank,
        "qk_head_dim": sizes.qk_dim,
        "qk_pos_emb_head_dim": sizes.rotary_dim,
        "v_head_dim": sizes.v_dim,
    }


def _moe_options(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.shared_ffn_hidden_size or None,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # others need CUDA streams; one process gathers nothing
    }
