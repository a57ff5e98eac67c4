"""The model's config, from the training run's arguments; what mptq does not quantize is refused by name."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from mptq.arch.families import LLAMA, MIXTRAL, Family
from mptq.errors import CheckpointError, UnsupportedModelError
from mptq.types import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-like decoder: RMSNorm, SwiGLU, rotary positions, MHA or GQA, no biases; or the same with experts in every layer.

    `num_experts` is 0 for a dense model; with experts, each has `moe_ffn_hidden_size`, a token goes to `moe_topk` of them,
    weighted by the softmax over their logits, and `router_dtype` (fp32, fp64, or None for that of the activations) is what
    the logits are computed in.
    `vocab_size` is the number of rows that mean something: the padding for tensor parallelism is above it.
    `source` says where the config came from, for people.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    norm_epsilon: float
    rotary_base: float
    max_position_embeddings: int
    tied_embeddings: bool
    dtype: str
    source: str
    tokenizer: str | None
    num_experts: int = 0
    moe_topk: int = 0
    moe_ffn_hidden_size: int = 0
    router_dtype: str | None = None

    @property
    def family(self) -> Family:
        """What Hugging Face calls the parts of this model."""
        return MIXTRAL if self.num_experts else LLAMA


FEATURES: dict[str, tuple[Container[Any], str]] = {
    "normalization": (("RMSNorm",), "a normalization other than RMSNorm"),
    "swiglu": ((True,), "an MLP without SwiGLU"),
    "position_embedding_type": (("rope",), "a position embedding other than rope"),
    "multi_latent_attention": ((False, None), "multi-latent attention"),
    "qk_layernorm": ((False, None), "QK normalization"),
    "qk_l2_norm": ((False, None), "QK L2 normalization"),
    "add_bias_linear": ((False,), "biases in linear layers"),
    "add_qkv_bias": ((False, None), "a QKV bias"),
    "rotary_interleaved": ((False, None), "interleaved rotary embeddings"),
    "rotary_percent": ((1.0, None), "partial rotary embeddings"),
    "rotary_seq_len_interpolation_factor": ((None, 1), "rotary position interpolation"),
    "use_rope_scaling": ((False, None), "Llama 3 rope scaling"),
    "no_rope_freq": ((None,), "layers without rotary embeddings"),
    "layernorm_zero_centered_gamma": ((False, None), "zero-centred norm weights"),
    "apply_layernorm_1p": ((False, None), "zero-centred norm weights"),
    "apply_residual_connection_post_layernorm": ((False, None), "residuals taken after the norm"),
    "window_size": ((None,), "sliding window attention"),
    "softmax_type": (("vanilla", None), "attention sinks"),
    "attention_output_gate": ((False, None), "an attention output gate"),
    "experimental_attention_variant": ((None,), "an experimental attention variant"),
    "hybrid_layer_pattern": ((None,), "hybrid layers (Mamba)"),
    "hybrid_override_pattern": ((None,), "hybrid layers (Mamba)"),
    "is_hybrid_model": ((False, None), "hybrid layers (Mamba)"),
    "heterogeneous_layers_config_path": ((None,), "heterogeneous layers"),
    "heterogeneous_layers_config_encoded_json": ((None,), "heterogeneous layers"),
    "mtp_num_layers": ((None, 0), "multi-token prediction layers"),
    "use_mup": ((False, None), "maximal update parametrization"),
    "activation_func_clamp_value": ((None,), "a clamped activation function"),
    "glu_linear_offset": ((0, None), "an offset in the gated linear unit"),
    "moe_mlp_glu_interleave_size": ((None,), "interleaved gate and up projections"),
}
"""Argument -> (the values that mptq quantizes, what any other value is). An absent argument counts as None, because
older Megatron versions, which lack the feature, lack its argument; the first three must be there. Of a list (one value a
layer, or several at once), every element must be accepted."""

MOE_FEATURES: dict[str, tuple[Container[Any], str]] = {
    "moe_router_topk": (range(2, 4096), "routing to fewer than two experts"),
    "moe_layer_freq": ((1, None), "dense layers between those with experts"),
    "moe_shared_expert_intermediate_size": ((None,), "shared experts"),
    "moe_router_pre_softmax": ((False, None), "a softmax over all experts, before the choice of the largest"),
    "moe_router_score_function": (("softmax", None), "a router score other than softmax"),
    "moe_router_num_groups": ((None,), "group-limited routing"),
    "moe_router_group_topk": ((None,), "group-limited routing"),
    "moe_router_topk_limited_devices": ((None,), "device-limited routing"),
    "moe_router_topk_scaling_factor": ((None, 1), "scaled router weights"),
    "moe_router_enable_expert_bias": ((False, None), "a bias of each expert in the router"),
    "moe_router_load_balancing_type": (
        ("none", "aux_loss", "seq_aux_loss", "global_aux_loss", None),
        "load balancing that is part of the routing",
    ),
    "moe_router_force_load_balancing": ((False, None), "random routing"),
    "moe_router_force_biased": ((None,), "random routing"),
    # A negative factor means no limit.
    "moe_expert_capacity_factor": ((None, -1), "a capacity limit of experts"),
    "moe_expert_rank_capacity_factor": ((None, -1), "a capacity limit of experts"),
    "moe_token_dropping": ((False, None), "token dropping"),
    "moe_apply_probs_on_input": ((False, None), "router weights applied to the experts' input"),
    "moe_latent_size": ((None,), "latent projections around the experts"),
}
"""The same for a mixture of experts: what of megatron/core/transformer/transformer_config.py changes its forward pass.

Losses, dispatchers, fused kernels and the input jitter of training change nothing that is stored.
"""


def from_args(args: Mapping[str, Any], source: str, tensors: Mapping[str, TensorSpec]) -> ModelConfig:
    """The config that the training run's `args` describe; `tensors` give the weights' dtype and the padded vocabulary.

    Raises CheckpointError without usable arguments and UnsupportedModelError naming every feature that is in the way.
    """
    if not args:
        raise CheckpointError(f"the checkpoint does not say its architecture ({source}): it needs Megatron-LM's args")
    features = FEATURES | MOE_FEATURES if args.get("num_experts") else FEATURES
    refused = [
        f"{meaning} ({name}={args.get(name)})"
        for name, (accepted, meaning) in features.items()
        if not _accepts(accepted, args.get(name))
    ]
    if refused:
        raise UnsupportedModelError(
            f"this checkpoint has {'; '.join(refused)}: mptq quantizes models like Llama and Mixtral so far"
        )
    try:
        return _config(args, source, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} lacks a usable value for {error}: the architecture is incomplete") from error


def _accepts(accepted: Container[Any], value: Any) -> bool:
    return all(item in accepted for item in value) if isinstance(value, list) and value else value in accepted


def _config(args: Mapping[str, Any], source: str, tensors: Mapping[str, TensorSpec]) -> ModelConfig:
    heads = int(args["num_attention_heads"])
    hidden = int(args["hidden_size"])
    # The optimizer has a copy of every parameter under its own prefix.
    tables = [name for name in tensors if name.endswith("word_embeddings.weight") and not name.startswith("optimizer.")]
    embedding = tensors[tables[0]] if tables else None
    padded = embedding.shape[0] if embedding else int(args["padded_vocab_size"])
    epsilon = args.get("norm_epsilon") or args.get("layernorm_epsilon")
    if epsilon is None:
        raise KeyError("norm_epsilon")
    experts = int(args.get("num_experts") or 0)
    return ModelConfig(
        num_layers=int(args["num_layers"]),
        hidden_size=hidden,
        ffn_hidden_size=int(args["ffn_hidden_size"]),
        num_attention_heads=heads,
        # Without grouped-query attention, Megatron leaves a meaningless 1 in num_query_groups.
        num_query_groups=int(args["num_query_groups"]) if args.get("group_query_attention") else heads,
        head_dim=int(args.get("kv_channels") or hidden // heads),
        vocab_size=min(int(args.get("vocab_size") or padded), padded),
        padded_vocab_size=padded,
        norm_epsilon=float(epsilon),
        rotary_base=float(args.get("rotary_base") or 10000),
        max_position_embeddings=int(args.get("max_position_embeddings") or args["seq_length"]),
        tied_embeddings=not args.get("untie_embeddings_and_output_weights"),
        dtype=embedding.dtype if embedding else "bfloat16",
        source=source,
        tokenizer=str(args["tokenizer_model"]) if args.get("tokenizer_model") else None,
        num_experts=experts,
        moe_topk=int(args["moe_router_topk"]) if experts else 0,
        moe_ffn_hidden_size=int(args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]) if experts else 0,
        router_dtype=args.get("moe_router_dtype") if experts else None,
    )
