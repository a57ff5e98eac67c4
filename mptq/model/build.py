"""Builds the model's config from settings and the shapes of tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mptq.errors import CheckpointError, UnsupportedModelError
from mptq.model.config import Context, LayerKind, MLAConfig, ModelConfig, yarn_of
from mptq.model.features import features
from mptq.model.settings import validate
from mptq.model.settings.settings import OPTIONS, Settings, unsaid
from mptq.model.settings.supported import REFUSED, obstacles, remedy
from mptq.model.settings.values import short
from mptq.types import TensorSpec


def model_config(settings: Settings, tensors: Mapping[str, TensorSpec]) -> ModelConfig:
    """Returns the config that `settings` describe; the dtype and the padded vocabulary come from `tensors`.

    Raises CheckpointError if the architecture is not known or a value is invalid, and UnsupportedModelError naming all
    unsupported features.
    """
    if not {"num_layers", "hidden_size"} & set(settings):
        raise CheckpointError(
            "the checkpoint does not specify its architecture: it has neither run_config.yaml nor Megatron-LM's args; "
            "pass --hf-config DIR or --config key=value"
        )
    missing = unsaid(settings)
    if missing:
        raise CheckpointError(
            "the checkpoint has neither run_config.yaml nor Megatron-LM's args, and its tensors do not determine "
            f"{', '.join(missing)}: pass --hf-config DIR, or each as --config key=value"
        )
    refused = obstacles(REFUSED, settings)
    if refused:
        raise UnsupportedModelError(f"this checkpoint has {'; '.join(refused)}, which mptq does not quantize{remedy(settings)}")
    validate.check(settings)
    try:
        made = _config(settings, tensors)
        return replace(made, features=features(made))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the architecture has no usable value for {error}: pass it as --config key=value, or --hf-config DIR"
        ) from error


def _needed(settings: Settings, key: str) -> int:
    """Returns a setting that has no default; raises KeyError if it is absent or None."""
    value = settings.get(key)
    if value is None:
        raise KeyError(key)
    return int(value)


def _config(settings: Settings, tensors: Mapping[str, TensorSpec]) -> ModelConfig:
    heads, hidden = _needed(settings, "num_attention_heads"), _needed(settings, "hidden_size")
    # The optimizer has a copy of every parameter under its own prefix.
    tables = [name for name in tensors if name.endswith("word_embeddings.weight") and not name.startswith("optimizer.")]
    embedding = tensors[tables[0]] if tables else None
    padded = embedding.shape[0] if embedding else _needed(settings, "padded_vocab_size")
    experts = int(settings.get("num_moe_experts") or 0)
    ffn = int(settings.get("ffn_hidden_size") or 4 * hidden)
    return ModelConfig(
        settings=settings,
        kinds=_kinds(settings),
        num_layers=_needed(settings, "num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=int(settings.get("num_query_groups") or heads),
        head_dim=int(settings.get("kv_channels") or hidden // heads),
        vocab_size=min(int(settings.get("vocab_size") or padded), padded),
        padded_vocab_size=padded,
        context=_context(settings),
        tied_embeddings=bool(settings.get("share_embeddings_and_output_weights")),
        dtype=embedding.dtype if embedding else "bfloat16",
        latent=_latent(settings),
        num_experts=experts,
        moe_ffn_hidden_size=int(settings.get("moe_ffn_hidden_size") or ffn) if experts else 0,
        shared_ffn_hidden_size=int(settings.get("moe_shared_expert_intermediate_size") or 0) if experts else 0,
    )


def _context(settings: Settings) -> Context:
    """Returns the number of positions.

    With YaRN it is the original length times the factor, as engines compute it too, whatever the sequence length in
    training; only --config takes precedence. Megatron-Bridge and NeMo 2 save only the sequence length of the training.
    """
    key = "max_position_embeddings"
    given, yarn = settings.get(key), yarn_of(settings)
    if yarn and yarn["rotary_scaling_factor"] > 1 and settings.sources.get(key) != OPTIONS:
        return Context(round(yarn["original_max_position_embeddings"] * yarn["rotary_scaling_factor"]), "yarn")
    if given:
        return Context(int(given), "settings")
    trained, most = settings.get("seq_length"), settings.get("model_max_length")
    if most and most > (trained or 0):
        return Context(int(most), "tokenizer")
    if not trained:
        raise KeyError(key)
    return Context(int(trained), "training")


def _latent(settings: Settings) -> MLAConfig | None:
    if not settings.get("multi_latent_attention"):
        return None
    names = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    kv_rank, qk_dim, rotary_dim, v_dim = (_needed(settings, name) for name in names)
    return MLAConfig(int(settings.get("q_lora_rank") or 0), kv_rank, qk_dim, rotary_dim, v_dim)


_LETTERS = {
    "M": LayerKind("mamba", ""),
    "*": LayerKind("attention", ""),
    "+": LayerKind("mla", ""),
    "-": LayerKind("", "mlp"),
    "E": LayerKind("", "moe"),
}
"""Symbols of a hybrid pattern. Source: megatron/core/models/hybrid/hybrid_layer_allocation.py."""


def _kinds(settings: Settings) -> tuple[LayerKind, ...]:
    layers = _needed(settings, "num_layers")
    pattern = settings.get("hybrid_layer_pattern")
    if pattern:
        letters = str(pattern).partition("/")[0].replace("|", "")
        if len(letters) != layers or set(letters) - set(_LETTERS):
            raise ValueError(f"hybrid_layer_pattern ({short(repr(letters))} for {layers} layers of {', '.join(_LETTERS)})")
        return tuple(_LETTERS[letter] for letter in letters)
    mixer = "mla" if settings.get("multi_latent_attention") else "attention"
    if not settings.get("num_moe_experts"):
        return (LayerKind(mixer, "mlp"),) * layers
    frequency = settings.get("moe_layer_freq") or 1
    sparse = (
        list(frequency) if isinstance(frequency, list | tuple) else [index % int(frequency) == 0 for index in range(layers)]
    )
    return tuple(LayerKind(mixer, "moe" if experts else "mlp") for experts in sparse)
