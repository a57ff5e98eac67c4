"""Builds the fields of config.json that many families share from the model's config. No torch.

Source: the configuration files of the families in transformers; modeling_rope_utils.py for `rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mptq.model.architectures.family import Family
from mptq.model.config import ModelConfig

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2"}


def config_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the arguments of `family.config_class` that describe the model."""
    fields = {
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": config.dtype,
        # Set by generation.py; None here because the config classes have default ids.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return fields | family.config_json(config)


def activation(config: ModelConfig) -> str:
    """Returns the name of the activation function in transformers."""
    word = str(config.get("activation_func"))
    return _ACTIVATIONS.get(word, word)


def rope(config: ModelConfig) -> dict[str, Any]:
    """Returns `rope_parameters`, and the older names that engines and transformers before 5 read."""
    theta = config.get("rotary_base")
    scaling = _SCALINGS[config.features["rope scaling"]](config)
    older = {"rope_theta": theta} | ({"rope_scaling": scaling | {"type": scaling["rope_type"]}} if scaling else {})
    found = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    if config.features["partial rotary"]:
        found |= {"partial_rotary_factor": config.get("rotary_percent")}
        older |= {"partial_rotary_factor": config.get("rotary_percent")}
    return {"rope_parameters": found} | older


def _llama3(config: ModelConfig) -> dict[str, Any]:
    # Constants in megatron-core (rotary_pos_embedding.py: _apply_scaling).
    return {
        "rope_type": "llama3",
        "factor": float(config.get("rope_scaling_factor")),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _yarn(config: ModelConfig) -> dict[str, Any]:
    """Returns YaRN's parameters. Engines all read `mscale` and `mscale_all_dim` only with multi-latent attention.

    The factor on cosine and sine ("concentration factor" in megatron-core) is written if it is not the default:
    transformers multiplies by `attention_factor`; vLLM and SGLang multiply the default by `attn_factor`.
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
        # transformers computes the quotient of the two only if neither is 0.
        return found | ({"attention_factor": scale} if scale != default and not all(scales) else {})
    if fields["correction_range_round_to_int"] is False:
        found["truncate"] = False
    if scale != default:
        found |= {"attention_factor": scale, "attn_factor": scale / default}
    return found


def concentration(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Returns YaRN's factor on cosine and sine.

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


def window(config: ModelConfig) -> int | None:
    """Returns the window in tokens including the current one, which megatron-core's excludes; None without one."""
    window = config.get("window_size")
    return None if not window else int(window[0]) + 1


def decoder(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that most families share."""
    return rope(config) | {
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": activation(config),
        "rms_norm_eps": config.norm_epsilon,
    }


def expert_groups(config: ModelConfig) -> dict[str, Any]:
    """Returns the expert group fields; a single group means no group-limited routing."""
    found = config.expert_groups
    return {"n_group": found.groups if found else 1, "topk_group": found.chosen if found else 1}


def routed_scaling(config: ModelConfig) -> float:
    """Returns the factor on the routing weights of a token's experts."""
    return float(config.get("moe_router_topk_scaling_factor") or 1)
