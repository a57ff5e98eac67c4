"""The families of models that mptq quantizes, as data: what Hugging Face calls their parts. No torch.

Source: transformers' modeling and configuration files of each family, and the names that `save_pretrained` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """How one family is spelled in Hugging Face.

    `mlp` are the modules of gate, up and down in a layer; `{}` in them stands for the expert. `router` is the module that
    chooses experts, empty in a dense model. `sizes` maps fields of transformers' config class to those of ModelConfig,
    beside the ones that all families share; `constants` are fields that are the same for every model.
    """

    name: str
    config_class: str
    architecture: str
    mlp: tuple[str, str, str]
    router: str = ""
    sizes: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


LLAMA = Family(
    name="Llama",
    config_class="LlamaConfig",
    architecture="LlamaForCausalLM",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    sizes={"intermediate_size": "ffn_hidden_size"},
    constants={"attention_bias": False, "mlp_bias": False},
)
MIXTRAL = Family(
    name="Mixtral",
    config_class="MixtralConfig",
    architecture="MixtralForCausalLM",
    mlp=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    router="block_sparse_moe.gate",
    sizes={
        "intermediate_size": "moe_ffn_hidden_size",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "moe_topk",
    },
)
