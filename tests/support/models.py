"""Models of every family as arguments of a training run, and their tensors as metadata."""

from mptq.model.build import model_config
from mptq.model.config import ModelConfig
from mptq.model.settings.from_megatron_args import from_args
from mptq.model.settings.settings import SettingsSource, merge
from mptq.model.tensors import layer_copies, layer_linears, megatron_layer, outer_copies
from mptq.types import TensorSpec

ARGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 16,
    "vocab_size": 100,
    "padded_vocab_size": 128,
    "norm_epsilon": 1e-5,
    "rotary_base": 5000,
    "max_position_embeddings": 512,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "tokenizer_model": "/x/tok",
}
MOE_ARGS = ARGS | {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_router_dtype": "fp32"}
TENSORS = {
    name: TensorSpec(name, "bfloat16", shape)
    for name, shape in {"embedding.word_embeddings.weight": (128, 64), "decoder.final_layernorm.weight": (64,)}.items()
}

SHARED = {"moe_shared_expert_intermediate_size": 96}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
LATENT = ARGS | {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "cache_mla_latents": False,
}
DEEPSEEK = LATENT | SHARED | {"num_experts": 8, "moe_router_topk": 4, "moe_ffn_hidden_size": 48, "moe_layer_freq": [0, 1]}
HYBRID = ARGS | {
    "num_layers": 5,
    "swiglu": False,
    "squared_relu": True,
    "position_embedding_type": "none",
    "hybrid_layer_pattern": "M*-ME",
    "mamba_state_dim": 8,
    "mamba_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_num_groups": 2,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
}
GELU = ARGS | {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": True}

FAMILY_ARGS = {
    "Llama": ARGS,
    "Mistral": ARGS | {"window_size": (7, 0)},
    "Qwen2": ARGS | {"add_qkv_bias": True},
    "Qwen3": ARGS | {"qk_layernorm": True, "kv_channels": 32},
    "Arcee": ARGS | {"swiglu": False, "squared_relu": True},
    "Nemotron": ARGS
    | {
        "normalization": "LayerNorm",
        "apply_layernorm_1p": True,
        "swiglu": False,
        "squared_relu": True,
        "rotary_percent": 0.5,
    },
    "OPT": GELU | {"position_embedding_type": "learned_absolute", "num_query_groups": 4},
    "StarCoder2": GELU,
    "Mixtral": MOE_ARGS,
    "Qwen2-MoE": MOE_ARGS | SHARED | {"add_qkv_bias": True, "moe_shared_expert_gate": True, "moe_router_pre_softmax": True},
    "Qwen3-MoE": MOE_ARGS | {"qk_layernorm": True},
    "DeepSeek-V3": DEEPSEEK | SIGMOID | {"q_lora_rank": 24, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "DeepSeek-V2": DEEPSEEK | {"moe_router_pre_softmax": True},
    "Nemotron-H": HYBRID | SHARED | SIGMOID,
}
"""Family -> arguments of a model that no earlier family in the table covers."""
OSS_ARGS = MOE_ARGS | {
    "add_bias_linear": True,
    "swiglu": False,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "softmax_type": "learnable",
    "window_size": (7, 0),
    "window_attn_skip_freq": 2,
}
"""A model that no family covers: sinks, windows in some layers, a clamped gate, biases of experts."""


def model(args, tensors=TENSORS, **told) -> ModelConfig:
    """The config of the model trained with these arguments; settings in `told` take precedence over them."""
    return model_config(merge([SettingsSource("told", told), SettingsSource("args", from_args(args))]), tensors)


def inner_shapes(config) -> dict[str, tuple[int, ...]]:
    """Shape of every inner tensor: megatron-core's local names, one key per layer and expert."""
    before, after = outer_copies(config)
    shapes = {copy.megatron: copy.shape for copy in (*before, *after)}
    for layer in range(config.num_layers):
        prefix = megatron_layer(layer)
        shapes |= {f"{prefix}{linear.megatron}.weight": linear.shape for linear in layer_linears(config, layer)}
        shapes |= {prefix + copy.megatron: copy.shape for copy in layer_copies(config, layer)}
    return shapes


def specs(shapes) -> dict[str, TensorSpec]:
    """Metadata of BF16 tensors of these shapes."""
    return {name: TensorSpec(name, "bfloat16", tuple(shape)) for name, shape in shapes.items()}
