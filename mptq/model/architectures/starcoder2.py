"""StarCoder2: rotary positions, LayerNorm, biases."""

from __future__ import annotations

from typing import Any

from mptq.model.architectures.config_json import decoder, window
from mptq.model.architectures.config_type import GPT, ROTARY, SIZES, ConfigType
from mptq.model.architectures.family import GELU, Family
from mptq.model.config import ModelConfig


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return decoder(config) | {
        "norm_epsilon": config.norm_epsilon,
        "use_bias": True,
        "mlp_type": "default",
        "sliding_window": window(config),
    }


FAMILY = Family(
    name="StarCoder2",
    config_class="Starcoder2Config",
    architecture="Starcoder2ForCausalLM",
    config_json=_config_json,
    config_types={
        "starcoder2": ConfigType(
            fields=f"{SIZES} {ROTARY} num_key_value_heads hidden_act norm_epsilon sliding_window use_bias layer_types",
            settings=GPT,
            fixed={"norm_type": ("layer_norm",), "mlp_type": ("default",)},
            ignored="head_dim rms_norm_eps",
            derived="head_dim",
        )
    },
    accepts={
        "norm": ("LayerNorm",),
        "mlp": GELU,
        "bias": (True,),
        "qkv bias": (True,),
        "head_dim": (False,),
        "window": ("no layer", "every layer"),
    },
    names={"mlp": "mlp.c_fc mlp.c_fc mlp.c_proj"},
)
