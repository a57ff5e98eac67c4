"""Nemotron and Minitron: zero-centered LayerNorm, squared ReLU, partial rotary embeddings."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import decoder
from mptq.model.architectures.config_type import LLAMA, ROTARY, SIZES, ConfigType
from mptq.model.architectures.family import EITHER, Family
from mptq.model.config import ModelConfig


def _config_json(config: ModelConfig) -> dict[str, Any]:
    fields = decoder(config) | {"norm_eps": config.norm_epsilon, "attention_bias": False, "mlp_bias": False}
    # The default is 0.5, so 1.0 must be written too.
    fields["rope_parameters"] |= {"partial_rotary_factor": config.get("rotary_percent")}
    return fields | {"partial_rotary_factor": config.get("rotary_percent")}


FAMILY = Family(
    name="Nemotron",
    config_class="NemotronConfig",
    architecture="NemotronForCausalLM",
    config_json=_config_json,
    config_types={
        "nemotron": ConfigType(
            fields=f"{SIZES} {ROTARY} num_key_value_heads head_dim hidden_act norm_eps partial_rotary_factor",
            settings={
                **LLAMA,
                "normalization": "LayerNorm",
                "layernorm_zero_centered_gamma": True,
                "gated_linear_unit": False,
                "rotary_percent": 0.5,
            },
            ignored="rms_norm_eps",
        )
    },
    accepts={
        "norm": ("LayerNorm",),
        "zero centred": (True,),
        "mlp": ("squared_relu",),
        "partial rotary": EITHER,
        "rope scaling": ("none", "linear"),
    },
)
