"""Settings from the arguments of a Megatron-LM training run, for megatron-core 0.13 to 0.19. No torch.

Source: `core_transformer_config_from_args`, `_apply_yarn_config_from_args` and `gpt_config_from_args` in
megatron/training/argument_utils.py (in megatron/training/arguments.py before 0.17), and megatron-core's TransformerConfig.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mptq.model.settings.settings import KINDS, completed, count
from mptq.model.settings.values import Unknown, plain

RENAMED = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
"""Argument -> setting with a different name. Some are from older versions, and the newer names take precedence."""

NEGATED = {
    "untie_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "disable_bias_linear": "add_bias_linear",
}
"""Argument -> setting with the opposite meaning."""

_GATES = {"swiglu": ("silu", True), "squared_relu": ("squared_relu", False), "quick_geglu": ("quick_gelu", True)}
"""Argument -> the activation function that it selects, and whether the MLP is gated; the first that is set applies."""

TRANSLATED = (*_GATES, "group_query_attention")
"""Arguments that determine other settings."""

_MLA = (
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
    *("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_YARN = {
    "rotary_scaling_factor": ("yarn_rotary_scaling_factor", 1.0),
    "yarn_original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("yarn_beta_fast", 32.0),
    "yarn_beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("yarn_mscale", 1.0),
    "mscale_all_dim": ("yarn_mscale_all_dim", 0.0),
    "yarn_correction_range_round_to_int": ("yarn_correction_range_round_to_int", True),
}
"""Argument -> the config attribute of a model with YaRN but without MLA, and its value if the argument is None."""


def from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for the arguments of a Megatron-LM training run, translated as Megatron-LM does.

    One exception: `rope_scaling_factor` is taken from the argument, which Megatron-LM's GPT models ignore and use 8.
    """
    settings = {key: args[key] for key in KINDS if key in args}
    settings |= {key: args[name] for name, key in RENAMED.items() if settings.get(key) is None and name in args}
    settings |= {key: not args[name] for name, key in NEGATED.items() if name in args}
    if args.get("group_query_attention") is False:
        settings["num_query_groups"] = None  # the argument's default is a meaningless 1
    settings = {key: plain(value) for key, value in settings.items()} | _mlp(args) | _attention_variant(args)
    if "vocab_size" in settings:
        settings["vocab_size"] = _vocabulary(args)
    if settings.get("num_moe_experts") == 0:
        settings["num_moe_experts"] = None
    if args.get("spec"):
        settings["hybrid_stack_spec" if settings.get("is_hybrid_model") else "transformer_layer_spec"] = _spec(args["spec"])
    for key in _absent(args):
        settings.pop(key, None)
    return completed({key: value for key, value in settings.items() if value is not Unknown})


def _vocabulary(args: Mapping[str, Any]) -> Any:
    """Returns the number of token ids of the run's tokenizer, or None if the arguments do not determine it.

    `--vocab-size` is for tokenizers without a vocabulary of their own. NullTokenizer adds its end of document after
    these ids up to megatron-core 0.17; from 0.18 on it is the last of them, or `--null-tokenizer-eod-id`, an argument
    that the same change added. NullMultimodalTokenizer still adds it after them. All others but TikTokenizer count
    their own tokens and ignore the argument, so it is used only if the embedding's padded rows follow from it.
    Source: megatron/core/tokenizers, {text,vision}/libraries/null*_tokenizer.py and utils/build_tokenizer.py.
    """
    size, kind = args["vocab_size"], args.get("tokenizer_type")
    if not count(size):
        return plain(size)
    if kind == "NullMultimodalTokenizer" or (kind == "NullTokenizer" and "null_tokenizer_eod_id" not in args):
        return size + 1
    if kind == "NullTokenizer":
        return max(size, (count(args["null_tokenizer_eod_id"]) or 0) + 1)
    unit, rows = _padding(args), count(args.get("padded_vocab_size"))
    padded = kind in (None, "TikTokenizer") or not (unit and rows) or rows == -(-size // unit) * unit
    return size if padded else None


def _padding(args: Mapping[str, Any]) -> int:
    """Returns the number to whose multiple Megatron-LM pads the embedding's rows; 0 if the arguments do not have it."""
    return math.prod(count(args.get(name)) or 0 for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))


def _mlp(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the activation function and whether it is gated."""
    chosen = next((made for name, made in _GATES.items() if args.get(name)), None)
    if chosen is None and "swiglu" not in args:
        return {}
    # The fused bias and GeLU kernels compute the tanh approximation; without biases there is no fusion.
    fused = args.get("bias_gelu_fusion") and args.get("add_bias_linear", True)
    word, gated = chosen or ("gelu_tanh" if fused else "gelu", False)
    return {"activation_func": word, "gated_linear_unit": gated}


def _attention_variant(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings implied by MLA, YaRN, and the layer pattern of hybrid models."""
    pattern = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    found: dict[str, Any] = {"is_hybrid_model": True} if pattern else {}
    if isinstance(pattern, str) and "D" in pattern:
        found["experimental_attention_variant"] = "dsa"
    if args.get("multi_latent_attention") and "kv_lora_rank" in args:
        # In megatron-core 0.13 the model's length is the one before YaRN; from 0.14 on it is a field without argument.
        length = 4096 if "cache_mla_latents" in args else args.get("max_position_embeddings")
        rope = {"rope_type": args.get("rope_type") or "yarn", "beta_fast": 32, "beta_slow": 1}
        return found | rope | {"original_max_position_embeddings": length}
    if args.get("position_embedding_type") == "yarn":
        found |= {
            key: default if args.get(name) is None else args[name] for name, (key, default) in _YARN.items() if name in args
        }
    return found


def _spec(value: Any) -> Any:
    """Returns the name of the layer spec: `--spec` is "local", or a module and a name in it."""
    words = plain(value)
    return words[-1] if isinstance(words, list) else words


def _absent(args: Mapping[str, Any]) -> list[str]:
    """Returns the settings whose arguments are meaningless: defaults of features that this model does not have."""
    absent: list[str] = []
    if "multi_latent_attention" in args and not args["multi_latent_attention"]:
        absent += _MLA
    if args.get("position_embedding_type", "yarn") != "yarn" or args.get("multi_latent_attention"):
        absent += [key for key, _ in _YARN.values()]
    return absent
