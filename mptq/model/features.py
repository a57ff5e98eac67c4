"""Named features that distinguish architectures; Hugging Face families declare which values they support. No torch."""

from __future__ import annotations

from typing import Any

from mptq.model.config import ModelConfig
from mptq.model.settings.supported import NOT_RUN, obstacles

WORDS = {
    "norm": "normalization {}",
    "zero centred": "zero-centered norm weights: {}",
    "mlp": "an MLP of {}",
    "position": "positions: {}",
    "rope scaling": "rotary scaling: {}",
    "partial rotary": "partial rotary embeddings: {}",
    "interleaved rotary": "interleaved rotary embeddings: {}",
    "bias": "biases in all linears: {}",
    "qkv bias": "a QKV bias: {}",
    "qk norm": "QK normalization: {}",
    "window": "sliding window attention in {}",
    "no rope": "layers without rotary embeddings: {}",
    "sinks": "attention sinks: {}",
    "attention": "attention: {}",
    "head_dim": "a head size other than hidden size / heads: {}",
    "tied": "tied embeddings: {}",
    "experts": "experts in {}",
    "router": "router scores: {}",
    "topk": "experts per token: {}",
    "groups": "group-limited routing: {}",
    "router scale": "scaled router weights: {}",
    "expert bias": "a router bias per expert: {}",
    "shared": "shared experts: {}",
    "glu clamp": "a clamped gated unit with an offset: {}",
    "hybrid": "hybrid layers (Mamba): {}",
    "not mapped": "{}",
}
"""Feature -> its text in messages; `{}` is its value."""


def features(config: ModelConfig) -> dict[str, Any]:
    """Returns the features of the architecture of `config`: strings, numbers and booleans, by the keys of `WORDS`."""
    found = (
        _attention(config)
        | _position(config)
        | {
            "norm": config.get("normalization"),
            "zero centred": bool(config.get("layernorm_zero_centered_gamma")),
            "mlp": ("gated " if config.gated else "") + config.get("activation_func"),
            "bias": config.bias,
            "tied": config.tied_embeddings,
            "glu clamp": bool(config.get("activation_func_clamp_value") or config.get("glu_linear_offset")),
            "hybrid": bool(config.get("hybrid_layer_pattern")),
            "not mapped": _not_mapped(config),
            "experts": _experts(config),
        }
    )
    return found | (_routing(config) if config.num_experts else {})


def _attention(config: ModelConfig) -> dict[str, Any]:
    latent, shared = config.latent is not None, config.num_query_groups != config.num_attention_heads
    return {
        "attention": "multi-latent" if latent else "grouped-query" if shared else "multi-head",
        "qk norm": "L2" if config.get("qk_l2_norm") else bool(config.get("qk_layernorm")),
        "qkv bias": config.bias or bool(config.get("add_qkv_bias")),
        "window": _window(config),
        "sinks": config.get("softmax_type") != "vanilla",
        "head_dim": not latent and config.head_dim * config.num_attention_heads != config.hidden_size,
    }


def _window(config: ModelConfig) -> str:
    if not config.get("window_size"):
        return "no layer"
    return "some layers" if config.get("window_attn_skip_freq") else "every layer"


def _position(config: ModelConfig) -> dict[str, Any]:
    kind = config.get("position_embedding_type")
    scaling = "none"
    if config.get("rope_scaling"):
        scaling = "llama3"
    elif _stretches(config):
        scaling = "yarn"
    elif config.get("seq_len_interpolation_factor"):
        scaling = "linear"
    return {
        "position": "rope" if kind == "yarn" or config.latent is not None else kind,
        "rope scaling": scaling,
        "partial rotary": float(config.get("rotary_percent")) != 1.0,
        "interleaved rotary": bool(config.get("rotary_interleaved")),
        "no rope": bool(config.get("no_rope_freq")),
    }


def _stretches(config: ModelConfig) -> bool:
    """Whether YaRN changes the rotary embedding, which a factor of 1 does not."""
    return config.yarn is not None and config.yarn["rotary_scaling_factor"] != 1


def _experts(config: ModelConfig) -> str:
    sparse = [kind.ffn == "moe" for kind in config.kinds if kind.ffn]
    if not any(sparse):
        return "no layer"
    if all(sparse):
        return "every layer"
    return "all but the first layers" if sparse == sorted(sparse) else "some layers"


def _routing(config: ModelConfig) -> dict[str, Any]:
    score = config.get("moe_router_score_function")
    if score == "softmax":
        score = "softmax of all" if config.get("moe_router_pre_softmax") else "softmax of the chosen"
    groups = config.expert_groups
    shared = "gated" if config.get("moe_shared_expert_gate") else "yes"
    return {
        "router": score,
        "topk": "one" if config.moe_topk == 1 else "several",
        "groups": by_the_best(config.moe_topk // groups.chosen) if groups else "none",
        "router scale": float(config.get("moe_router_topk_scaling_factor") or 1) != 1,
        "expert bias": bool(config.get("moe_router_enable_expert_bias")),
        "shared": shared if config.shared_ffn_hidden_size else "none",
    }


def by_the_best(experts: int) -> str:
    """Returns the feature value for choosing expert groups by the summed scores of their best `experts` experts."""
    return f"by the best {experts} of a group"


_UNMAPPED = tuple(key for key in NOT_RUN if key not in ("hybrid_layer_pattern", "position_embedding_type", "activation_func"))


def _not_mapped(config: ModelConfig) -> str:
    """Describes the features that no Hugging Face architecture has."""
    found = obstacles({key: NOT_RUN[key] for key in _UNMAPPED}, config.settings)
    if config.latent is not None:
        if not config.get("qk_layernorm"):
            found.append("multi-latent attention without norms of its latents")
        scale = float(config.get("rotary_scaling_factor")) > 1 and float(config.get("mscale_all_dim"))
        if scale and not _stretches(config):
            found.append("a scale of the attention scores without yarn (mscale_all_dim)")
        if config.shared_ffn_hidden_size % max(1, config.moe_ffn_hidden_size):
            found.append(f"shared experts ({config.shared_ffn_hidden_size}) that are no multiple of an expert")
    return "; ".join(found) or "nothing"
