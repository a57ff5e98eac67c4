"""The settings in a Hugging Face `config.json`. No torch, no transformers: the file is read as JSON.

Source: transformers' configuration files of each family, and its modeling files for what no field says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mptq.arch.values import activation
from mptq.errors import CheckpointError

_FIELDS = {
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "hidden_size": "hidden_size",
    "n_embd": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "n_inner": "ffn_hidden_size",
    "ffn_dim": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "n_head": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_positions": "max_position_embeddings",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "rope_theta": "rotary_base",
    "partial_rotary_factor": "rotary_percent",
    "rotary_pct": "rotary_percent",
    "num_local_experts": "num_moe_experts",
    "num_experts": "num_moe_experts",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "scoring_func": "moe_router_score_function",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "num_nextn_predict_layers": "mtp_num_layers",
    "attention_bias": "add_qkv_bias",
    "use_bias": "add_bias_linear",
    "mlp_bias": "add_bias_linear",
    "enable_bias": "add_bias_linear",
    "use_qk_norm": "qk_layernorm",
    "ssm_state_size": "mamba_state_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "n_groups": "mamba_num_groups",
}
_EPSILONS = {
    "rms_norm_eps": "RMSNorm",
    "layer_norm_eps": "LayerNorm",
    "layer_norm_epsilon": "LayerNorm",
    "norm_epsilon": "LayerNorm",
    "norm_eps": "LayerNorm",
}
"""Field -> the normalization of models that have it; their value is the epsilon."""

_ACTIVATIONS = ("hidden_activation", "hidden_act", "mlp_hidden_act", "activation_function")
_UNSAID: dict[str, Any] = {"add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False}
"""What a family of `_FAMILIES` does where no field says otherwise."""

_ROTARY: dict[str, Any] = {"position_embedding_type": "rope", "rotary_interleaved": False}
_GATED: dict[str, Any] = {"gated_linear_unit": True, **_ROTARY}
_LEARNED: dict[str, Any] = {
    "gated_linear_unit": False,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
}
_LATENT: dict[str, Any] = {"qk_layernorm": True, "multi_latent_attention": True, **_GATED}
_SIGMOID: dict[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED,
    "mixtral": {"moe_router_pre_softmax": False, **_GATED},
    "qwen2": {"add_qkv_bias": True, **_GATED},
    "qwen2_moe": {"add_qkv_bias": True, "moe_shared_expert_gate": True, **_GATED},
    "qwen3": {"qk_layernorm": True, **_GATED},
    "qwen3_moe": {"qk_layernorm": True, **_GATED},
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, **_SIGMOID},
    "gemma": {"layernorm_zero_centered_gamma": True, **_GATED},
    "nemotron": {"gated_linear_unit": False, **_ROTARY, "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    "nemotron_h": {"gated_linear_unit": False, "position_embedding_type": "none", "normalization": "RMSNorm"},
    "starcoder2": {"gated_linear_unit": False, **_ROTARY, "normalization": "LayerNorm"},
    "gpt2": {"add_bias_linear": True, "share_embeddings_and_output_weights": True, **_LEARNED},
    "opt": {"layernorm_epsilon": 1e-5, **_LEARNED},
}
"""`model_type` -> what its code does, whatever the fields say."""

_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def from_hf_config(path: Path) -> tuple[dict[str, Any], str]:
    """The settings in a Hugging Face directory's config.json, or in that file, and the file's path.

    Raises CheckpointError where there is no such file or it is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"--hf-config: {file} does not exist: give a Hugging Face directory or its config.json"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"--hf-config: {file} is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"--hf-config: {file} is no JSON object: give a Hugging Face config.json")
    return from_fields(fields), str(file)


def from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the fields of a Hugging Face config; of a model with images or speech, in those of its text."""
    inner = fields.get("text_config")
    fields = {**fields, **inner} if isinstance(inner, Mapping) else fields
    family = _FAMILIES.get(str(fields.get("model_type")))
    settings = dict(_UNSAID) if family else {}
    settings |= {key: fields[name] for name, key in _FIELDS.items() if fields.get(name) is not None}
    for name, normalization in _EPSILONS.items():
        if fields.get(name) is not None:
            settings |= {"normalization": normalization, "layernorm_epsilon": fields[name]}
    function = next((fields[name] for name in _ACTIVATIONS if fields.get(name) is not None), None)
    settings |= {"activation_func": activation(function)} if function is not None else {}
    settings |= (family or {}) | _heads(fields) | _positions(fields)
    if settings.get("add_bias_linear"):
        settings["add_qkv_bias"] = True
    if not settings.get("mtp_num_layers"):
        settings["mtp_num_layers"] = _NOTHING  # what Hugging Face leaves out, a training checkpoint can have
    for part in (_hybrid, _experts):
        settings |= part(fields, settings)
    return {key: value for key, value in settings.items() if value is not _NOTHING}


_NOTHING = object()
"""Stands for a setting that a field says nothing of after all."""


def _heads(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same as another field where it is absent; one size of heads says nothing in multi-latent attention."""
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    found: dict[str, Any] = {}
    if heads and fields.get("num_key_value_heads") is None:
        found["num_query_groups"] = heads
    if fields.get("kv_lora_rank"):
        found["kv_channels"] = _NOTHING
    elif heads and hidden and fields.get("head_dim") is None:
        found["kv_channels"] = hidden // heads
    window = fields.get("sliding_window")
    if window and fields.get("use_sliding_window", True):
        found["window_size"] = [window - 1, 0]  # Hugging Face counts the token itself
    return found


def _hybrid(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The letters of Nemotron-H's layers; without experts among them, what its fields say of experts means nothing."""
    if fields.get("model_type") != "nemotron_h":
        return {}
    kinds = fields.get("layers_block_type")
    pattern = "".join(_LETTERS[kind] for kind in kinds) if kinds else fields.get("hybrid_override_pattern", "")
    found: dict[str, Any] = {"hybrid_layer_pattern": pattern, "is_hybrid_model": True, "num_layers": len(pattern)}
    if "E" in pattern:
        return found | _SIGMOID
    dead = [key for key in settings if key.startswith("moe_") or key == "num_moe_experts"]
    return found | dict.fromkeys(dead, _NOTHING)


def _experts(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if settings.get("num_moe_experts") in (None, _NOTHING):
        return found
    width = settings.get("moe_ffn_hidden_size") or fields.get("intermediate_size")
    found["moe_ffn_hidden_size"] = width
    shared = fields.get("n_shared_experts")
    if shared and width and not settings.get("moe_shared_expert_intermediate_size"):
        found["moe_shared_expert_intermediate_size"] = shared * width
    if settings.get("moe_router_num_groups") == 1 or fields.get("topk_method") == "greedy":
        found |= {"moe_router_num_groups": None, "moe_router_group_topk": None}  # one group is no choice of groups
    if "norm_topk_prob" in fields and settings.get("moe_router_score_function", "softmax") == "softmax":
        found["moe_router_pre_softmax"] = not fields["norm_topk_prob"]
    first, layers = fields.get("first_k_dense_replace"), fields.get("num_hidden_layers")
    if first and layers:
        found["moe_layer_freq"] = [0] * first + [1] * (layers - first)
    return found


def _positions(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    factor = parameters.get("factor")
    found: dict[str, Any] = {}
    if parameters.get("rope_theta") is not None:
        found["rotary_base"] = parameters["rope_theta"]
    if kind == "llama3":
        found |= {"rope_scaling": True, "rope_scaling_factor": factor} | {
            f"rope_{name}": parameters[name]
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if name in parameters
        }
    elif kind == "linear":
        found["seq_len_interpolation_factor"] = factor
    elif kind == "yarn":
        found |= _yarn(fields, parameters)
    return found


def _yarn(fields: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN, whose fields multi-latent attention has under names of its own."""
    latent = bool(fields.get("kv_lora_rank"))
    names = {
        "factor": "rotary_scaling_factor",
        "original_max_position_embeddings": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    }
    found: dict[str, Any] = {"rope_type": "yarn"} if latent else {"position_embedding_type": "yarn"}
    return found | {
        name if latent else f"yarn_{name}": parameters[field] for field, name in names.items() if field in parameters
    }
