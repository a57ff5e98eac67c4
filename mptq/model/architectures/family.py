"""What mptq knows of an architecture of Hugging Face, as one record. No torch.

Source: transformers' modeling and configuration files of each, and the names that `save_pretrained` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mptq.model.architectures.config_type import ConfigType
from mptq.model.config import ModelConfig
from mptq.model.features import WORDS

# Values of features that several architectures accept.
EITHER = (True, False)
GELU = ("gelu", "gelu_tanh")
SOME_EXPERTS = ("every layer", "all but the first layers", "some layers")

_MODULES = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.core_attention": "self_attn",
    "mlp": "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "mlp.router": "mlp.gate",
    "mlp.experts": "mlp.experts.{}.gate_proj mlp.experts.{}.up_proj mlp.experts.{}.down_proj",
    "mlp.shared_experts": "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj",
    "mlp.shared_experts.gate": "mlp.shared_expert_gate",
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "decoder.final_norm": "model.norm",
    "output_layer": "lm_head",
}
_FUSED = {"qkv_proj": "q_proj k_proj v_proj", "gate_up_proj": "gate_proj up_proj"}
PLAIN: dict[str, tuple[Any, ...]] = {
    "norm": ("RMSNorm",),
    "zero centred": (False,),
    "mlp": ("gated silu",),
    "position": ("rope",),
    "rope scaling": ("none", "llama3", "linear", "yarn"),
    "partial rotary": (False,),
    "interleaved rotary": (False,),
    "bias": (False,),
    "qkv bias": (False,),
    "qk norm": (False,),
    "window": ("no layer",),
    "no rope": (False,),
    "sinks": (False,),
    "attention": ("multi-head", "grouped-query"),
    "head_dim": EITHER,
    "tied": EITHER,
    "experts": ("no layer",),
    "router": ("softmax of the chosen",),
    "topk": ("several",),
    "groups": ("none",),
    "router scale": (False,),
    "expert bias": (False,),
    "shared": ("none",),
    "glu clamp": (False,),
    "hybrid": (False,),
    "not mapped": ("nothing",),
}
"""What the plainest architecture, Llama, can express: feature (features.py) -> values."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One architecture of Hugging Face: what makes a Megatron model one of it, and what it calls everything.

    Attributes:
        name: What people call it.
        config_class, architecture: transformers' classes of its config and of the model with its language head.
        config_json: The fields of config.json that follow from the model's config, beside those of every family.
        config_types: What its config.json says, by `model_type`: what `config_json` writes is read back to the same settings.
        accepts: Features (features.py) in which it differs from `PLAIN` -> the values that it can express.
        approximates: Features that it computes otherwise than Megatron -> values that are written anyway, and what differs.
        names: Megatron's module -> its own, several for a fused one, where they are not Llama's.
        layer: Prefix of a layer's modules.
        fused: Fused module of an engine -> its members in the order of their rows; they are fused where all are there
            (vLLM's `packed_modules_mapping`; tests/support/vllm_models.json has what vLLM says).
        reserved_positions: Rows of its position embedding that come before the first position's.
        latent_epsilon: Epsilon of the norms of latents, which its code has as a constant.

    """

    name: str
    config_class: str
    architecture: str
    config_json: Callable[[ModelConfig], dict[str, Any]]
    config_types: Mapping[str, ConfigType]
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    approximates: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    layer: str = "model.layers.{}."
    fused: Mapping[str, str] = field(default_factory=lambda: _FUSED)
    reserved_positions: int = 0
    latent_epsilon: float | None = None

    def modules(self, megatron: str) -> tuple[str, ...]:
        """The Hugging Face modules of a module that Megatron calls so."""
        return tuple((self.names.get(megatron) or _MODULES[megatron]).split())

    def missing(self, config: ModelConfig) -> list[str]:
        """The features of a model that this architecture cannot express, for people."""
        nearly = {name: values for name, (values, _) in self.approximates.items()}
        return [
            _difference(name, value, self)
            for name, value in config.features.items()
            if value not in self.expressed(name) and value not in nearly.get(name, ())
        ]

    def expressed(self, feature: str) -> tuple[Any, ...]:
        """The values of a feature that this architecture can express."""
        return (PLAIN | dict(self.accepts))[feature]

    def deviations(self, config: ModelConfig) -> list[str]:
        """What transformers and engines compute otherwise than megatron-core, of a model that is written nevertheless."""
        return [words for name, (values, words) in self.approximates.items() if config.features.get(name) in values]


def _difference(feature: str, value: Any, family: Family) -> str:
    """A feature that a model has and a family has not, and what that has instead, for people."""
    said = WORDS[feature].format(_word(value))
    return said if feature == "not mapped" else f"{said} ({family.name}: {' or '.join(map(_word, family.expressed(feature)))})"


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value))
