"""Architecture settings and their sources. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mptq.model.architectures.registry import family_of, nearest_family
from mptq.model.config import ModelConfig
from mptq.model.features import WORDS
from mptq.model.settings.settings import Settings
from mptq.model.settings.supported import DEFAULTS

DEFAULTED = "megatron-core's default"
_FEATURES = {
    "num_moe_experts": ("moe_",),
    "hybrid_layer_pattern": ("mamba_",),
    "mtp_num_layers": ("mtp_",),
    "use_mup": ("mup_",),
    "linear_attention_freq": ("linear_",),
    "experimental_attention_variant": ("dsa_",),
    "rope_scaling": ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_"),
}
"""Setting that enables a feature -> prefixes of settings that have no effect without it."""
_YARN = ("yarn_", "beta_", "mscale", "original_max_position_embeddings", "rotary_scaling_factor", "rope_type")


def settings_document(settings: Settings) -> dict[str, Any]:
    """Returns every setting with its value, source and whether it matters to this model, and conflicts between sources.

    A setting matters if its feature is enabled and its own value is not None, 0, empty or False (unless the default is True).
    """
    entries = {key: (value, settings.sources[key]) for key, value in settings.entries.items()}
    entries |= {key: (value, DEFAULTED) for key, value in DEFAULTS.items() if settings.get(key) is None}
    rows = [
        {"key": key, "value": value, "source": source, "matters": _matters(key, value, settings)}
        for key, (value, source) in entries.items()
    ]
    conflicts = [asdict(conflict) | {"text": str(conflict)} for conflict in settings.conflicts]
    return {"settings": rows, "conflicts": conflicts}


def _matters(key: str, value: Any, settings: Mapping[str, Any]) -> bool:
    if value in (None, False, 0, "") and not (value is False and DEFAULTS.get(key) is True):
        return False
    if any(key.startswith(heads) and not settings.get(feature) for feature, heads in _FEATURES.items()):
        return False
    return not key.startswith(_YARN) or _has_yarn(key, settings)


def _has_yarn(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether the model uses YaRN and `key` is the name of a YaRN setting for its kind of attention."""
    if settings.get("multi_latent_attention"):
        return not key.startswith("yarn_") and (key == "rope_type" or (settings.get("rope_type") or "yarn") == "yarn")
    return settings.get("position_embedding_type") == "yarn" and key.startswith("yarn_")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """Returns the Hugging Face architecture or the nearest one, what it lacks, and why the model cannot be run."""
    family, near = family_of(model), nearest_family(model)
    return {
        "family": family.name if family else None,
        "class": family.architecture if family else None,
        "nearest": near.name,
        "lacks": near.missing(model),
        "not_run": model.not_run,
        "features": {name: value for name, value in model.features.items() if name in WORDS},
    }


def words(model: ModelConfig) -> str:
    """Describes the model in one line."""
    experts = f"{model.num_experts} experts, {model.moe_topk} per token, each with ffn {model.moe_ffn_hidden_size}"
    return (
        f"{getattr(family_of(model), 'name', 'Megatron')}-like, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{experts if model.num_experts else f'ffn {model.ffn_hidden_size}'}, {_heads(model)}, "
        f"vocabulary {model.vocab_size} (stored {model.padded_vocab_size}), "
        f"{'tied' if model.tied_embeddings else 'untied'} embeddings"
    )


def _heads(model: ModelConfig) -> str:
    if model.latent is not None:
        return f"{model.num_attention_heads} heads of multi-latent attention, rank {model.latent.kv_rank}"
    return f"{model.num_attention_heads} heads in {model.num_query_groups} groups of {model.head_dim}"
