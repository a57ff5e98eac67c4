"""Describes a Hugging Face architecture as one record. No torch.

Source: the modeling and configuration files of each in transformers, and the names that `save_pretrained` writes.
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
"""The feature values that the plainest architecture, Llama, can express: feature (features.py) -> values."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One Hugging Face architecture: which Megatron models it can express, and its names for their modules.

    Attributes:
        name: Display name.
        config_class, architecture: The classes in transformers of its config and of the causal language model.
        config_json: Returns the fields of config.json for a model's config, besides those that every family has.
        config_types: How its config.json is read, by `model_type`; the output of `config_json` gives the same settings.
        accepts: Features (features.py) in which it differs from `PLAIN` -> the values that it can express.
        approximates: Features that it computes differently from Megatron -> values written anyway, and a warning.
        names: Megatron's module -> its own modules (several for a fused one), if they differ from Llama's.
        layer: Prefix of a layer's modules.
        fused: Fused module of an engine -> its members in row order; they are fused if the model has all of them
            (vLLM's `packed_modules_mapping`; tests/support/vllm_models.json records vLLM's behavior).
        reserved_positions: Number of rows in its position embedding before the first position.
        latent_epsilon: Epsilon of the norms of latents, if it is a constant in its code.

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
        """Returns the Hugging Face modules for a Megatron module."""
        return tuple((self.names.get(megatron) or _MODULES[megatron]).split())

    def missing(self, config: ModelConfig) -> list[str]:
        """Returns the features of a model that this architecture cannot express, in words for display."""
        nearly = {name: values for name, (values, _) in self.approximates.items()}
        return [
            _difference(name, value, self)
            for name, value in config.features.items()
            if value not in self.expressed(name) and value not in nearly.get(name, ())
        ]

    def expressed(self, feature: str) -> tuple[Any, ...]:
        """Returns the values of a feature that this architecture can express."""
        return (PLAIN | dict(self.accepts))[feature]

    def deviations(self, config: ModelConfig) -> list[str]:
        """Returns a warning for each feature that transformers and engines compute differently from megatron-core."""
        return [words for name, (values, words) in self.approximates.items() if config.features.get(name) in values]


def _difference(feature: str, value: Any, family: Family) -> str:
    """Describes a feature value that a family cannot express, and the values that it can."""
    text = WORDS[feature].format(_word(value))
    return text if feature == "not mapped" else f"{text} ({family.name}: {' or '.join(map(_word, family.expressed(feature)))})"


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value))
