"""Settings from a Hugging Face `config.json`. No torch, no transformers: the file is read as JSON.

Source: the configuration files of each family in transformers, and its modeling files for what no field specifies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.errors import CheckpointError
from mptq.model.architectures.config_type import UNSAID, ConfigType
from mptq.model.generation import IDS, GenerationSource
from mptq.model.settings.settings import LARGEST
from mptq.model.settings.values import activation

if TYPE_CHECKING:
    from mptq.model.settings.hf_config_fields import Rope

_LARGEST = 16 << 20  # size limit in bytes; configs have a few kB


def from_hf_config(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the settings in a config.json, given by its path or its directory, and the path of the file.

    Raises CheckpointError if the file is missing, is not a JSON object, or has a field that mptq does not understand.
    """
    file = path / "config.json" if path.is_dir() else path
    return from_fields(read_object(file), f"--hf-config: {file}"), str(file)


def generation_sources(path: Path) -> list[GenerationSource]:
    """Returns the generation settings in a directory's generation_config.json, if any, and in its config.json.

    Raises CheckpointError for the same reasons as `from_hf_config`.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = read_object(file)
    ids = {key: value for key, value in (dict(fields) | dict(_text(fields, str(file)))).items() if key in IDS}
    beside = file.with_name("generation_config.json")
    found = [GenerationSource(str(beside), read_object(beside), whole=True)] if beside.is_file() and beside != file else []
    return [*found, GenerationSource(str(file), ids)]


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of Hugging Face; raises CheckpointError if there is none."""
    try:
        text = file.read_text() if file.stat().st_size <= _LARGEST else ""
        content = json.loads(text)
    except OSError as error:
        raise CheckpointError(
            f"--hf-config: {file} cannot be read ({error.strerror}): pass a Hugging Face directory or its config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"--hf-config: {file} is not valid JSON ({error}): pass a Hugging Face config.json") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"--hf-config: {file} is not a JSON object: pass a Hugging Face config.json")
    return content


TOKENIZER = "tokenizer_config.json"


def from_tokenizer(named: Any) -> dict[str, Any]:
    """Returns `model_max_length` of the tokenizer in a directory (or a file's directory) if it is a valid length.

    transformers writes 1e30 if none was set. A missing or unreadable file is ignored here: loading the tokenizer later
    reports it.
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
    """Returns the settings in the fields of a Hugging Face config; of a multimodal model, in its text config.

    Raises CheckpointError naming `where` for fields that are not understood (hf_config_fields.py).
    """
    from mptq.model.settings.hf_config_fields import ACTIVATIONS, EPSILONS, SETTINGS, understood

    kind, given = understood(_text(fields, where), where)
    settings = dict(kind.settings) | {SETTINGS[name]: value for name, value in given.items() if name in SETTINGS}
    epsilon = next((given[name] for name in EPSILONS if name in given), None)
    settings |= {} if epsilon is None else {"layernorm_epsilon": epsilon}
    function = next((given[name] for name in ACTIVATIONS if name in given), None)
    settings |= {} if function is None else {"activation_func": activation(function)}
    settings |= _heads(given, kind) | _positions(given) | _window(given, kind)
    if settings.get("add_bias_linear"):
        settings["add_qkv_bias"] = True
    if not settings.get("mtp_num_layers"):
        settings.pop("mtp_num_layers", None)  # Hugging Face models lack these layers, but the checkpoint can have them
    settings |= kind.refine(given, settings)
    settings |= _experts(given, settings)
    return {key: value for key, value in settings.items() if value is not UNSAID}


def _text(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns the fields of a model's text part, which are in `text_config` if there is one."""
    inner = fields.get("text_config")
    if inner is None:
        return fields
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: text_config is not an object")
    # The outer fields of the embeddings also apply to the text part.
    return {name: fields[name] for name in ("tie_word_embeddings", "vocab_size") if name in fields} | dict(inner)


def _heads(given: Mapping[str, Any], kind: ConfigType) -> dict[str, Any]:
    """Returns the number of query groups and the head size if these are absent and derived from other fields."""
    heads = given.get("num_attention_heads") or given.get("n_head")
    hidden = given.get("hidden_size") or given.get("n_embd")
    found: dict[str, Any] = {}
    if heads and "num_key_value_heads" in kind.derived and "num_key_value_heads" not in given:
        found["num_query_groups"] = heads
    if heads and hidden and "head_dim" in kind.derived and "head_dim" not in given:
        found["kv_channels"] = hidden // heads
    return found


def _window(given: Mapping[str, Any], kind: ConfigType) -> dict[str, Any]:
    """Returns the sliding window, which includes the current token in Hugging Face, and the layers that use it."""
    window = given.get("sliding_window")
    switched = "use_sliding_window" in kind.fields.split()
    if not window or (switched and not given.get("use_sliding_window")):
        return {"window_size": None} if window or switched else {}
    layers = given.get("num_hidden_layers", 1)
    first = given.get("max_window_layers", 0) if switched else 0
    kinds = given.get("layer_types")
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [layer >= first for layer in range(layers)]
    if not any(sliding):
        return {"window_size": None}
    found: dict[str, Any] = {"window_size": [window - 1, 0]}
    return found | ({} if all(sliding) else {"window_attn_skip_freq": [int(flag) for flag in sliding]})


def _experts(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if settings.get("num_moe_experts") in (None, 0, UNSAID):
        return found
    width = settings.get("moe_ffn_hidden_size")
    shared = given.get("n_shared_experts")
    if shared and width and not settings.get("moe_shared_expert_intermediate_size"):
        found["moe_shared_expert_intermediate_size"] = shared * width
    if settings.get("moe_router_num_groups") == 1 or given.get("topk_method") == "greedy":
        found |= {"moe_router_num_groups": None, "moe_router_group_topk": None}  # a single group does not limit the routing
    if "norm_topk_prob" in given and settings.get("moe_router_score_function") != "sigmoid":
        found["moe_router_pre_softmax"] = not given["norm_topk_prob"]
    return found | _sparse(given)


def _sparse(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which layers have experts, if not all do."""
    layers, first = given.get("num_hidden_layers", 0), given.get("first_k_dense_replace", 0)
    step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", ())
    flags = [int(layer >= first and (layer + 1) % step == 0 and layer not in dense) for layer in range(layers)]
    return {} if all(flags) else {"moe_layer_freq": flags}


def _positions(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary embedding: `rope_parameters` in transformers 5, `rope_theta` and `rope_scaling` before."""
    rope: Rope | None = given.get("rope_parameters") or given.get("rope_scaling")
    if rope is None:
        return {}
    found: dict[str, Any] = {}
    if rope.rope_theta is not None:
        found["rotary_base"] = rope.rope_theta
    if rope.partial_rotary_factor is not None:
        found["rotary_percent"] = rope.partial_rotary_factor
    latent = bool(given.get("kv_lora_rank"))
    if rope.kind == "yarn":
        return found | _yarn(given, rope, latent)
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


def _yarn(given: Mapping[str, Any], rope: Rope, latent: bool) -> dict[str, Any]:
    """Returns the YaRN settings, which have different names for multi-latent attention."""
    fields = {
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings or given.get("max_position_embeddings"),
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
