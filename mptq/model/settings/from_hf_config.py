"""The settings in a Hugging Face `config.json`. No torch, no transformers: the file is read as JSON.

Source: transformers' configuration files of each family, and its modeling files for what no field says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mptq.errors import CheckpointError
from mptq.model.generation import IDS, GenerationSource
from mptq.model.settings.hf_config_fields import SIGMOID, HfFamily, Rope, understood
from mptq.model.settings.settings import LARGEST
from mptq.model.settings.values import activation

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
    "attention_head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_positions": "max_position_embeddings",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "rope_theta": "rotary_base",
    "partial_rotary_factor": "rotary_percent",
    "num_local_experts": "num_moe_experts",
    "num_experts": "num_moe_experts",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "num_nextn_predict_layers": "mtp_num_layers",
    "use_bias": "add_bias_linear",
    "enable_bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
    "ssm_state_size": "mamba_state_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "n_groups": "mamba_num_groups",
}
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_ACTIVATIONS = ("hidden_act", "mlp_hidden_act", "activation_function")
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
_LARGEST = 16 << 20  # bytes of a file; configs have a few kB


def from_hf_config(path: Path) -> tuple[dict[str, Any], str]:
    """The settings in a Hugging Face directory's config.json, or in that file, and the file's path.

    Raises CheckpointError where there is no such file, it is not a JSON object, or has a field that mptq does not understand.
    """
    file = path / "config.json" if path.is_dir() else path
    return from_fields(read_object(file), f"--hf-config: {file}"), str(file)


def generation_sources(path: Path) -> list[GenerationSource]:
    """What a Hugging Face directory says of generation in its generation_config.json, if it has one, and its config.json.

    Raises CheckpointError as `from_hf_config` does.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = read_object(file)
    ids = {key: value for key, value in (dict(fields) | dict(_text(fields, str(file)))).items() if key in IDS}
    beside = file.with_name("generation_config.json")
    found = [GenerationSource(str(beside), read_object(beside), whole=True)] if beside.is_file() and beside != file else []
    return [*found, GenerationSource(str(file), ids)]


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of Hugging Face; raises CheckpointError where there is none."""
    try:
        text = file.read_text() if file.stat().st_size <= _LARGEST else ""
        content = json.loads(text)
    except OSError as error:
        raise CheckpointError(
            f"--hf-config: {file} cannot be read ({error.strerror}): give a Hugging Face directory or its config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"--hf-config: {file} is not valid JSON ({error}): give a Hugging Face config.json") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"--hf-config: {file} is not a JSON object: give a Hugging Face config.json")
    return content


TOKENIZER = "tokenizer_config.json"


def from_tokenizer(named: Any) -> dict[str, Any]:
    """What the tokenizer in a directory, or of a file in it, says of the model: `model_max_length`, if it is a length.

    transformers writes 1e30 where nobody said one. A file that is not there or not readable says nothing here: it is named
    where the tokenizer itself is loaded.
    """
    if not isinstance(named, Path | str):
        return {}
    path = Path(named)
    try:
        fields = json.loads((path.parent if path.is_file() else path).joinpath(TOKENIZER).read_text())
    except (OSError, ValueError):
        return {}
    length = fields.get("model_max_length") if isinstance(fields, dict) else None
    return {"model_max_length": length} if type(length) is int and 0 < length < LARGEST else {}


def from_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings in the fields of a Hugging Face config; of a model with images or speech, in those of its text.

    Raises CheckpointError, naming `where` they stand, for fields that are not understood (hf_config_fields.py).
    """
    family, told = understood(_text(fields, where), where)
    settings = family.settings | {_FIELDS[name]: value for name, value in told.items() if name in _FIELDS}
    epsilon = next((told[name] for name in _EPSILONS if name in told), None)
    settings |= {} if epsilon is None else {"layernorm_epsilon": epsilon}
    function = next((told[name] for name in _ACTIVATIONS if name in told), None)
    settings |= {} if function is None else {"activation_func": activation(function)}
    settings |= _heads(told, family) | _positions(told) | _window(told, family)
    if settings.get("add_bias_linear"):
        settings["add_qkv_bias"] = True
    if not settings.get("mtp_num_layers"):
        settings.pop("mtp_num_layers", None)  # what Hugging Face leaves out, a training checkpoint can have
    for part in (_hybrid, _experts):
        settings |= part(told, settings)
    return {key: value for key, value in settings.items() if value is not _NOTHING}


def _text(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The fields that say what the text part of a model is: those in `text_config` where there is one."""
    inner = fields.get("text_config")
    if inner is None:
        return fields
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: text_config is not an object")
    # Of the outer fields, those of the embeddings are the text's too.
    return {name: fields[name] for name in ("tie_word_embeddings", "vocab_size") if name in fields} | dict(inner)


_NOTHING = object()
"""Stands for a setting that a field says nothing of after all."""


def _heads(told: Mapping[str, Any], family: HfFamily) -> dict[str, Any]:
    """What follows from other fields where it is absent."""
    heads = told.get("num_attention_heads") or told.get("n_head")
    hidden = told.get("hidden_size") or told.get("n_embd")
    found: dict[str, Any] = {}
    if heads and "num_key_value_heads" in family.derived and "num_key_value_heads" not in told:
        found["num_query_groups"] = heads
    if heads and hidden and "head_dim" in family.derived and "head_dim" not in told:
        found["kv_channels"] = hidden // heads
    return found


def _window(told: Mapping[str, Any], family: HfFamily) -> dict[str, Any]:
    """The sliding window, which Hugging Face counts with the token itself, and the layers that have it."""
    window = told.get("sliding_window")
    switched = "use_sliding_window" in family.keys.split()
    if not window or (switched and not told.get("use_sliding_window")):
        return {"window_size": None} if window or switched else {}
    layers = told.get("num_hidden_layers", 1)
    first = told.get("max_window_layers", 0) if switched else 0
    kinds = told.get("layer_types")
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [layer >= first for layer in range(layers)]
    if not any(sliding):
        return {"window_size": None}
    found: dict[str, Any] = {"window_size": [window - 1, 0]}
    return found | ({} if all(sliding) else {"window_attn_skip_freq": [int(flag) for flag in sliding]})


def _hybrid(told: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The letters of Nemotron-H's layers; without experts among them, what its fields say of experts means nothing."""
    kinds = told.get("layers_block_type")
    pattern = "".join(_LETTERS[kind] for kind in kinds) if kinds else told.get("hybrid_override_pattern")
    if not pattern:
        return {}
    found: dict[str, Any] = {"hybrid_layer_pattern": pattern, "is_hybrid_model": True, "num_layers": len(pattern)}
    if "E" in pattern:
        return found | SIGMOID
    dead = [key for key in settings if key.startswith("moe_") or key == "num_moe_experts"]
    return found | dict.fromkeys(dead, _NOTHING)


def _experts(told: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if settings.get("num_moe_experts") in (None, 0, _NOTHING):
        return found
    width = settings.get("moe_ffn_hidden_size")
    if width is None and "intermediate_size" in told:  # Mixtral's, which has no other MLP
        width = told["intermediate_size"]
        found |= {"ffn_hidden_size": _NOTHING, "moe_ffn_hidden_size": width}
    shared = told.get("n_shared_experts")
    if shared and width and not settings.get("moe_shared_expert_intermediate_size"):
        found["moe_shared_expert_intermediate_size"] = shared * width
    if settings.get("moe_router_num_groups") == 1 or told.get("topk_method") == "greedy":
        found |= {"moe_router_num_groups": None, "moe_router_group_topk": None}  # one group is no choice of groups
    if "norm_topk_prob" in told and settings.get("moe_router_score_function") != "sigmoid":
        found["moe_router_pre_softmax"] = not told["norm_topk_prob"]
    return found | _sparse(told)


def _sparse(told: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have experts, where not all do."""
    layers, first = told.get("num_hidden_layers", 0), told.get("first_k_dense_replace", 0)
    step, dense = told.get("decoder_sparse_step", 1), told.get("mlp_only_layers", ())
    flags = [int(layer >= first and (layer + 1) % step == 0 and layer not in dense) for layer in range(layers)]
    return {} if all(flags) else {"moe_layer_freq": flags}


def _positions(told: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before."""
    rope: Rope | None = told.get("rope_parameters") or told.get("rope_scaling")
    if rope is None:
        return {}
    found: dict[str, Any] = {}
    if rope.rope_theta is not None:
        found["rotary_base"] = rope.rope_theta
    if rope.partial_rotary_factor is not None:
        found["rotary_percent"] = rope.partial_rotary_factor
    latent = bool(told.get("kv_lora_rank"))
    if rope.kind == "yarn":
        return found | _yarn(told, rope, latent)
    found |= {"rope_type": "rope"} if latent else {}
    scaled, linear = rope.kind == "llama3", rope.kind == "linear"
    found |= {"rope_scaling": scaled, "seq_len_interpolation_factor": rope.factor if linear else None}
    if scaled:
        found |= {
            "rope_scaling_factor": rope.factor,
            "rope_low_freq_factor": rope.low_freq_factor,
            "rope_high_freq_factor": rope.high_freq_factor,
            "rope_original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return found


def _yarn(told: Mapping[str, Any], rope: Rope, latent: bool) -> dict[str, Any]:
    """YaRN, whose fields multi-latent attention has under names of its own."""
    fields = {
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings or told.get("max_position_embeddings"),
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
    if not latent:
        fields["correction_range_round_to_int"] = rope.truncate
    found: dict[str, Any] = {"rope_type": "yarn"} if latent else {"position_embedding_type": "yarn"}
    prefix = "" if latent else "yarn_"
    return found | {prefix + name: value for name, value in fields.items() if value is not None}
