"""The architecture under megatron-core's names: one flat mapping, with the source of each entry. No torch.

Keys are fields of megatron-core's TransformerConfig and MLATransformerConfig (transformer/transformer_config.py), and
the arguments of GPTModel and related code; `KINDS` lists them all. Values are plain (numbers, strings, lists, None).
`activation_func` is one of `ACTIVATIONS`, or the full name of an unknown function. An absent key is not specified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mptq.model.settings.values import short

LARGEST = 1 << 24  # limit of widths, vocabulary sizes and numbers of heads: larger values would only waste memory
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "squared_relu", "relu", "quick_gelu")
"""Values of `activation_func`; `gelu_tanh` is the approximation that megatron-core's fused bias and GeLU computes."""

_INTEGERS = """
num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size padded_vocab_size
make_vocab_size_divisible_by max_position_embeddings seq_length model_max_length
num_moe_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_glu_interleave_size
moe_router_topk moe_router_topk_limited_devices moe_router_num_groups moe_router_group_topk moe_latent_size
moe_mlp_glu_interleave_size mtp_num_layers q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
original_max_position_embeddings yarn_original_max_position_embeddings rope_original_max_position_embeddings
dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads mup_base_hidden_size attention_chunk_size moe_n_hash_layers
"""
_NUMBERS = """
layernorm_epsilon softmax_scale glu_linear_offset activation_func_clamp_value rotary_base rotary_percent
rope_scaling_factor rope_low_freq_factor rope_high_freq_factor seq_len_interpolation_factor rotary_scaling_factor
beta_fast beta_slow mscale mscale_all_dim yarn_rotary_scaling_factor yarn_beta_fast yarn_beta_slow yarn_mscale
yarn_mscale_all_dim moe_router_topk_scaling_factor moe_router_force_biased moe_expert_capacity_factor
moe_expert_rank_capacity_factor dsa_indexer_k_norm_epsilon mup_width_mult mup_embedding_mult mup_output_mult
mup_base_head_dim mup_attn_scale_power attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar
"""
_FLAGS = """
gated_linear_unit add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate multi_latent_attention
layernorm_zero_centered_gamma apply_residual_connection_post_layernorm fp32_residual_connection rotary_interleaved
rope_scaling share_embeddings_and_output_weights apply_query_key_layer_scaling attention_softmax_in_fp32
yarn_correction_range_round_to_int moe_shared_expert_gate moe_router_pre_softmax moe_router_enable_expert_bias
moe_router_force_load_balancing moe_token_dropping moe_apply_probs_on_input mtp_use_repeated_layer is_hybrid_model
heterogeneous_block_specs use_mup dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
dsa_indexer_k_norm_fp32 use_transformer_engine_full_layer_spec enable_hyper_connections
"""
_WORDS = """
normalization activation_func position_embedding_type rope_type softmax_type experimental_attention_variant
moe_router_score_function moe_router_dtype hybrid_layer_pattern heterogeneous_layers_config_path
heterogeneous_layers_config_encoded_json params_dtype tokenizer_model tokenizer_type provider transformer_layer_spec
hybrid_stack_spec mamba_stack_spec
"""
_FREE = """
moe_layer_freq moe_router_load_balancing_type linear_attention_freq no_rope_freq window_size window_attn_skip_freq
mrope_section interleaved_attn_pattern
"""
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_INTEGERS.split(), (int,)),
    **dict.fromkeys(_NUMBERS.split(), (float, int)),
    **dict.fromkeys(_FLAGS.split(), (bool,)),
    **dict.fromkeys(_WORDS.split(), (str,)),
    **dict.fromkeys(_FREE.split(), (int, str, list)),
}
"""Every key that settings can have, with the types of its value, which can also be None.

Six are not megatron-core's: `params_dtype` is the name of a dtype, `provider` the class of Megatron-Bridge or NeMo that
builds the model, `model_max_length` is the tokenizer's, and `rope_low_freq_factor`, `rope_high_freq_factor` and
`rope_original_max_position_embeddings` are fixed to 1, 4 and 8192 in megatron-core if `rope_scaling` is on.
"""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two sources disagree on `key`: `kept` is the value of `source`, which takes precedence over `other_source`."""

    key: str
    kept: Any
    source: str
    other: Any
    other_source: str

    def __str__(self) -> str:
        kept, other = short(repr(self.kept)), short(repr(self.other))
        return f"{self.key}: {self.source} has {kept}, {self.other_source} has {other}: using {self.source}"


@dataclass(frozen=True, slots=True)
class Settings(Mapping[str, Any]):
    """The known settings of a model's architecture; `sources` has the source of each key."""

    entries: Mapping[str, Any]
    sources: Mapping[str, str]
    conflicts: tuple[Conflict, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, slots=True)
class SettingsSource:
    """One source of settings. With `overrides` (the user's own), other sources may differ without a conflict."""

    source: str
    entries: Mapping[str, Any]
    overrides: bool = False


def merge(rungs: Iterable[SettingsSource]) -> Settings:
    """Merges settings of several sources, each from the first source that has it; differing values become conflicts."""
    entries: dict[str, Any] = {}
    holders: dict[str, SettingsSource] = {}
    conflicts = []
    for rung in rungs:
        for key, value in rung.entries.items():
            holder = holders.setdefault(key, rung)
            if holder is rung:
                entries[key] = value
            elif not (holder.overrides or agree(key, entries[key], value)):
                conflicts.append(Conflict(key, entries[key], holder.source, value, rung.source))
    return Settings(entries, {key: rung.source for key, rung in holders.items()}, tuple(conflicts))


OPTIONS, SHAPES = "--config", "the tensors' shapes"
_NEEDED = ("num_attention_heads", "layernorm_epsilon", "activation_func", "position_embedding_type", "max_position_embeddings")


def unsaid(settings: Settings) -> list[str]:
    """Returns missing settings that affect the results and cannot be derived from shapes.

    Only if there is no config at all; otherwise megatron-core's defaults apply.
    """
    if set(settings.sources.values()) - {OPTIONS, SHAPES}:
        return []
    rotary = ("rotary_base",) if settings.get("position_embedding_type") == "rope" else ()
    return [key for key in _NEEDED + rotary if settings.get(key) is None]


_SINGLE = ("moe_router_num_groups", "moe_router_group_topk")
"""Settings for which 1 means the same as None: a single group of experts does not limit the routing."""


def agree(key: str, one: Any, other: Any) -> bool:
    """Whether two values of `key` are equivalent; None, False and 0 all mean that a feature is absent."""
    if key == "hybrid_layer_pattern":
        one, other = (str(value or "").partition("/")[0].replace("|", "") for value in (one, other))
    if key in _SINGLE:
        one, other = (None if value == 1 else value for value in (one, other))
    if key == "moe_layer_freq":
        length = next((len(value) for value in (one, other) if isinstance(value, list)), 0)
        one, other = (_expanded(value, length) for value in (one, other))
    return bool(one == other) or (not one and not other)


def _expanded(frequency: Any, length: int) -> Any:
    """Expands a layer frequency to one number per layer: 1 for the first of every `frequency` layers."""
    return [int(layer % frequency == 0) for layer in range(length)] if isinstance(frequency, int) and frequency else frequency


def completed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `entries` with the values that TransformerConfig's `__post_init__` computes for fields that are None.

    Source: megatron/core/transformer/transformer_config.py.
    """
    found = dict(entries)
    # Values that are not numbers are ignored here and reported later (validate.py).
    hidden, heads, layers = (count(found.get(key)) for key in ("hidden_size", "num_attention_heads", "num_layers"))
    _fill(found, "ffn_hidden_size", hidden and 4 * hidden)
    _fill(found, "kv_channels", hidden and heads and hidden // heads)
    _fill(found, "num_query_groups", heads)
    if found.get("num_moe_experts") and not _has_experts(found):
        found["num_moe_experts"] = None
    if count(found.get("num_moe_experts")):
        _fill(found, "moe_ffn_hidden_size", found.get("ffn_hidden_size"))
    factor = found.get("moe_expert_capacity_factor")
    if isinstance(factor, int | float) and factor < 0:  # means no limit in Megatron
        found["moe_expert_capacity_factor"] = None
    pattern = count(found.get("no_rope_freq"))
    if pattern and layers:
        found["no_rope_freq"] = ([0] * (pattern - 1) + [1]) * (layers // pattern)
    return found | (_mup(found) if found.get("use_mup") and hidden and count(found.get("kv_channels")) else {})


def _has_experts(found: Mapping[str, Any]) -> bool:
    """Whether any layer has experts; the number of experts can be set as a default even if no layer has any."""
    pattern, frequency = found.get("hybrid_layer_pattern"), found.get("moe_layer_freq")
    if isinstance(pattern, str) and pattern:
        return "E" in pattern.partition("/")[0]
    return not isinstance(frequency, list) or any(frequency)


def _mup(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scale factors of maximal update parametrization, from the width of the base model."""
    base = count(found.get("mup_base_hidden_size")) or found["hidden_size"]
    width = found["hidden_size"] / base
    head = _positive(found, "mup_base_head_dim") ** 0.5 / found["kv_channels"] ** _positive(found, "mup_attn_scale_power", 8)
    output = _positive(found, "mup_output_mult")
    return {
        "mup_base_hidden_size": base,
        "mup_width_mult": width,
        "mup_output_mult": 1 / width if output == 1 else output,
        "softmax_scale": head if found.get("softmax_scale") is None else found["softmax_scale"],
    }


def count(value: Any) -> int | None:
    """Returns `value` if it is a positive integer within limits, else None; validate.py reports invalid values."""
    return value if isinstance(value, int) and 0 < value < LARGEST else None


def _positive(entries: Mapping[str, Any], key: str, largest: float = LARGEST) -> float:
    value = entries.get(key)
    return float(value) if isinstance(value, int | float) and 0 < value <= largest else 1.0


def _fill(entries: dict[str, Any], key: str, value: Any) -> None:
    """Sets `key` to `value` if it is present and None; an absent key stays absent."""
    if key in entries and entries[key] is None and value:
        entries[key] = value
