"""The fields of Hugging Face's config.json, from the model's config. No torch.

Source: the configuration files of transformers' families; `rope_parameters` as in its modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mptq.model.architectures.families import Family
from mptq.model.config import ModelConfig

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2"}


def config_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The arguments of `family.config_class` that describe the model."""
    fields = {
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": config.dtype,
        # Of generation (generation.py): the classes have ids of their own as defaults.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return fields | _FIELDS[family.name](config)


def _activation(config: ModelConfig) -> str:
    word = str(config.get("activation_func"))
    return _ACTIVATIONS.get(word, word)


def _rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`, and the older names that engines and transformers before 5 read."""
    theta = config.get("rotary_base")
    scaling = _SCALINGS[config.features["rope scaling"]](config)
    older = {"rope_theta": theta} | ({"rope_scaling": scaling | {"type": scaling["rope_type"]}} if scaling else {})
    found = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    if config.features["partial rotary"]:
        found |= {"partial_rotary_factor": config.get("rotary_percent")}
        older |= {"partial_rotary_factor": config.get("rotary_percent")}
    return {"rope_parameters": found} | older


def _llama3(config: ModelConfig) -> dict[str, Any]:
    # megatron-core has these as constants (rotary_pos_embedding.py: _apply_scaling).
    return {
        "rope_type": "llama3",
        "factor": float(config.get("rope_scaling_factor")),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _yarn(config: ModelConfig) -> dict[str, Any]:
    """YaRN's parameters. Only classes of multi-latent attention read `mscale` and `mscale_all_dim` in every engine.

    The factor on cosine and sine ("concentration factor" in megatron-core) is written where it is not the default:
    `attention_factor` is what transformers multiplies by, `attn_factor` what vLLM and SGLang multiply the default by.
    """
    fields = config.yarn
    assert fields is not None
    factor, *scales = (float(fields[name]) for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"))
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields["original_max_position_embeddings"],
        "beta_fast": float(fields["beta_fast"]),
        "beta_slow": float(fields["beta_slow"]),
    }
    scale, default = concentration(factor, *scales), concentration(factor, 1.0, 0.0)
    if config.latent:
        found |= dict(zip(("mscale", "mscale_all_dim"), scales, strict=True))
        # transformers computes the quotient of the two only where neither is 0.
        return found | ({"attention_factor": scale} if scale != default and not all(scales) else {})
    if fields["correction_range_round_to_int"] is False:
        found["truncate"] = False
    if scale != default:
        found |= {"attention_factor": scale, "attn_factor": scale / default}
    return found


def concentration(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """The factor on cosine and sine.

    Source: `_yarn_get_concentration_factor` in megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py.
    """
    if factor <= 1:
        return 1.0
    above, below = (0.1 * scale * math.log(factor) + 1.0 for scale in (mscale, mscale_all_dim))
    return above / below


_SCALINGS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "none": lambda _: {},
    "linear": lambda config: {"rope_type": "linear", "factor": float(config.get("seq_len_interpolation_factor"))},
    "llama3": _llama3,
    "yarn": _yarn,
}


def _window(config: ModelConfig) -> int | None:
    """Tokens that a token sees, itself among them: megatron-core's window counts those before it."""
    window = config.get("window_size")
    return None if not window else int(window[0]) + 1


def _decoder(config: ModelConfig) -> dict[str, Any]:
    """What most families share."""
    return _rope(config) | {
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": _activation(config),
        "rms_norm_eps": config.norm_epsilon,
    }


def _llama(config: ModelConfig) -> dict[str, Any]:
    return _decoder(config) | {"attention_bias": False, "mlp_bias": False}


def _mistral(config: ModelConfig) -> dict[str, Any]:
    return _decoder(config) | {"sliding_window": _window(config)}


def _qwen(config: ModelConfig) -> dict[str, Any]:
    return _decoder(config) | {"use_sliding_window": False, "sliding_window": None, "attention_bias": False}


def _nemotron(config: ModelConfig) -> dict[str, Any]:
    fields = _decoder(config) | {"norm_eps": config.norm_epsilon, "attention_bias": False, "mlp_bias": False}
    fields["rope_parameters"] |= {"partial_rotary_factor": config.get("rotary_percent")}
    return fields | {"partial_rotary_factor": config.get("rotary_percent")}


def _opt(config: ModelConfig) -> dict[str, Any]:
    return {
        "ffn_dim": config.ffn_hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "activation_function": _activation(config),
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    }


def _starcoder(config: ModelConfig) -> dict[str, Any]:
    return _decoder(config) | {
        "norm_epsilon": config.norm_epsilon,
        "use_bias": True,
        "mlp_type": "default",
        "sliding_window": _window(config),
    }


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    return _decoder(config) | {
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.moe_topk,
        "sliding_window": _window(config),
    }


def _qwen_moe(config: ModelConfig) -> dict[str, Any]:
    return _qwen(config) | {
        "qkv_bias": config.features["qkv bias"],
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": config.shared_ffn_hidden_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.moe_topk,
        "norm_topk_prob": config.features["router"] == "softmax of the chosen",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(config.kinds) if kind.ffn == "mlp"],
    }


def _groups(config: ModelConfig) -> dict[str, Any]:
    """The groups of experts; one group limits nothing."""
    found = config.expert_groups
    return {"n_group": found.groups if found else 1, "topk_group": found.chosen if found else 1}


def _deepseek(config: ModelConfig) -> dict[str, Any]:
    sizes = config.latent
    assert sizes is not None
    return (
        _rope(config)
        | _groups(config)
        | {
            "num_key_value_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_hidden_size,
            "hidden_act": _activation(config),
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
            "routed_scaling_factor": float(config.get("moe_router_topk_scaling_factor") or 1),
            "first_k_dense_replace": sum(kind.ffn == "mlp" for kind in config.kinds),
            "moe_layer_freq": 1,
        }
    )


def _deepseek2(config: ModelConfig) -> dict[str, Any]:
    return _deepseek(config) | {
        "topk_method": "group_limited_greedy" if config.expert_groups else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def _deepseek3(config: ModelConfig) -> dict[str, Any]:
    return _deepseek(config) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
    }


_BLOCKS = {("mamba", ""): "mamba", ("attention", ""): "attention", ("", "mlp"): "mlp", ("", "moe"): "moe"}


def _nemotron_h(config: ModelConfig) -> dict[str, Any]:
    heads = int(config.get("mamba_num_heads") or 2 * config.hidden_size // config.get("mamba_head_dim"))
    experts = {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.moe_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.shared_ffn_hidden_size,
        "n_shared_experts": 1,
        "routed_scaling_factor": float(config.get("moe_router_topk_scaling_factor") or 1),
        "norm_topk_prob": True,
    } | _groups(config)
    return {
        "layers_block_type": [_BLOCKS[kind.mixer, kind.ffn] for kind in config.kinds],
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "mlp_hidden_act": _activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "ssm_state_size": config.get("mamba_state_dim"),
        "mamba_num_heads": heads,
        "mamba_head_dim": config.get("mamba_head_dim"),
        "n_groups": config.get("mamba_num_groups"),
    } | (experts if config.num_experts else {})


_FIELDS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "Llama": _llama,
    "Mistral": _mistral,
    "Qwen2": _qwen,
    "Qwen3": _qwen,
    "Nemotron": _nemotron,
    "OPT": _opt,
    "StarCoder2": _starcoder,
    "Mixtral": _mixtral,
    "Qwen2-MoE": _qwen_moe,
    "Qwen3-MoE": _qwen_moe,
    "DeepSeek-V2": _deepseek2,
    "DeepSeek-V3": _deepseek3,
    "Nemotron-H": _nemotron_h,
}
