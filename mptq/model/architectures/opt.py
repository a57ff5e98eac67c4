"""OPT: learned positions, LayerNorm, biases. Early Megatron GPT models are written as OPT."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import activation
from mptq.model.architectures.config_type import LEARNED_POSITIONS, ConfigType
from mptq.model.architectures.family import GELU, Family
from mptq.model.config import ModelConfig


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "ffn_dim": config.ffn_hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "activation_function": activation(config),
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    }


FAMILY = Family(
    name="OPT",
    config_class="OPTConfig",
    architecture="OPTForCausalLM",
    config_json=_config_json,
    config_types={
        "opt": ConfigType(
            fields="num_hidden_layers hidden_size ffn_dim num_attention_heads vocab_size max_position_embeddings "
            "tie_word_embeddings activation_function enable_bias word_embed_proj_dim",
            settings={**LEARNED_POSITIONS, "layernorm_epsilon": 1e-5},
            fixed={
                "do_layer_norm_before": (True,),
                "_remove_final_layer_norm": (False,),
                "layer_norm_elementwise_affine": (True,),
            },
        )
    },
    accepts={
        "norm": ("LayerNorm",),
        "mlp": (*GELU, "relu"),
        "position": ("learned_absolute",),
        "bias": (True,),
        "qkv bias": (True,),
        "head_dim": (False,),
        "attention": ("multi-head",),
    },
    names={
        "input_layernorm": "self_attn_layer_norm",
        "pre_mlp_layernorm": "final_layer_norm",
        "self_attention.linear_proj": "self_attn.out_proj",
        "mlp": "fc1 fc1 fc2",
        "embedding.word_embeddings": "model.decoder.embed_tokens",
        "embedding.position_embeddings": "model.decoder.embed_positions",
        "decoder.final_layernorm": "model.decoder.final_layer_norm",
    },
    layer="model.decoder.layers.{}.",
    reserved_positions=2,
)
