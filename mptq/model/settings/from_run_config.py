"""Settings from the YAML configs that Megatron-Bridge and NeMo 2 save with the weights. No torch.

Bridge: `run_config.yaml`, whose `model` has the fields of a provider (a TransformerConfig with GPTModel's arguments), or
those of a GPTModelConfig with a TransformerConfig under `transformer` (megatron/bridge/models/gpt_provider.py,
megatron/training/models/gpt.py). NeMo 2: `context/model.yaml`, with a GPTConfig under `config`
(nemo/collections/llm/gpt/model/base.py). Both are already plain data; their `_target_` are read as names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mptq.model.settings.run_config_fields import NEUTRAL
from mptq.model.settings.settings import KINDS, completed
from mptq.model.settings.values import Unknown, activation, plain, short

_NESTED = ("transformer", "config")
_RENAMED = {"hybrid_override_pattern": "hybrid_layer_pattern"}
_SPECS = ("transformer_layer_spec", "hybrid_stack_spec", "mamba_stack_spec")
"""Fields with a function, partial function or object that defines the layers."""
_SAME = frozenset({"use_transformer_engine", "vp_stage"})
"""Arguments of such functions that change neither tensors nor results."""
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values with which an unknown field is assumed to have no effect."""
_LLAMA31 = {
    "scale_factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "old_context_len": "rope_original_max_position_embeddings",
}
"""Fields of NeMo's Llama31Config, which scales rotary frequencies if it has them."""


def from_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in the `model` and `tokenizer` sections of a run config."""
    model = document.get("model")
    settings = _from_model(_flat(model)) if isinstance(model, Mapping) else {}
    tokenizer = document.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        named = {key: plain(tokenizer.get(key)) for key in ("tokenizer_model", "tokenizer_type")}
        settings |= {key: value for key, value in named.items() if isinstance(value, str)}
    return settings


def generation_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the generation config in a run config: Bridge's `config_dict` or NeMo's fields; empty if there is none.

    Source: `_generation_config_representer` in megatron/training/config/yaml_utils.py.
    """
    model = document.get("model")
    found = _flat(model).get("generation_config") if isinstance(model, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    fields = found.get("config_dict", found)
    return {key: value for key, value in fields.items() if not key.startswith("_")} if isinstance(fields, Mapping) else {}


def unread(document: Mapping[str, Any]) -> list[str]:
    """Returns the model fields in a run config that mptq does not know, as key=value, if they may have an effect."""
    model = document.get("model")
    fields = _flat(model) if isinstance(model, Mapping) else {}
    known = {*KINDS, *NEUTRAL, *_RENAMED, *_LLAMA31}
    others = {key: value for key, value in fields.items() if not (key in known or key.startswith("_") or value in _OFF)}
    return [f"{key}={short(value)}" for key, value in others.items()]


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the model and of the config nested in it; those of the model take precedence."""
    flat: dict[str, Any] = {}
    for name in _NESTED:
        inner = model.get(name)
        if isinstance(inner, Mapping):
            flat |= inner
    return flat | {key: value for key, value in model.items() if key not in _NESTED}


def _from_model(model: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: plain(model[key]) for key in KINDS if key in model}
    settings |= {key: plain(model[name]) for name, key in _RENAMED.items() if name in model and not settings.get(key)}
    settings |= {key: _spec(model[key]) for key in _SPECS if key in model}
    if model.get("activation_func") is not None:
        settings["activation_func"] = _activation(model)
    if "scale_factor" in model and "old_context_len" in model:
        settings |= {"rope_scaling": True} | {key: plain(model[name]) for name, key in _LLAMA31.items() if name in model}
    if "_target_" in model:
        settings["provider"] = _last(model["_target_"])
    if settings.get("multi_latent_attention") and "original_max_position_embeddings" not in settings:
        # In megatron-core 0.13 this field is the length before YaRN, which has its own name in later versions.
        _rename(settings, "max_position_embeddings", "original_max_position_embeddings")
    return completed({key: value for key, value in settings.items() if value is not Unknown})


def _activation(model: Mapping[str, Any]) -> Any:
    """Returns the activation function; fused kernels and Transformer Engine's use the tanh approximation of GeLU."""
    word = activation(model["activation_func"])
    fused = model.get("bias_activation_fusion") and (model.get("gated_linear_unit") or model.get("add_bias_linear", True))
    return "gelu_tanh" if word == "gelu" and (fused or model.get("use_te_activation_func")) else word


def _spec(value: Any) -> Any:
    """Returns the name of the layer spec, with the arguments of a partial function."""
    if not isinstance(value, Mapping):
        return plain(value)
    given = {key: argument for key, argument in value.items() if not key.startswith("_") and key not in _SAME}
    listed = value.get("_args_")
    arguments = [*(listed if isinstance(listed, list) else []), *(f"{key}={argument}" for key, argument in given.items())]
    name = _last(value.get("_target_") or "an object without a name")
    return name + (f"({', '.join(map(short, arguments))})" if arguments else "")


def _last(target: Any) -> str:
    return str(target).rpartition(".")[2]


def _rename(settings: dict[str, Any], old: str, new: str) -> None:
    if old in settings:
        settings[new] = settings.pop(old)
