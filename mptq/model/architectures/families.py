"""The architectures of Hugging Face that mptq writes, as data: what they call their parts, and what they can express. No torch.

Source: transformers' modeling and configuration files of each, and the names that `save_pretrained` writes. An architecture
is another row of `FAMILIES`; its fields in config.json are in config_json.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mptq.model.features import WORDS, by_the_best

if TYPE_CHECKING:
    from mptq.model.config import ModelConfig

_EITHER = (True, False)
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
_LATENT = {
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "mlp.shared_experts": "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj",
}
_QKV = {"qkv_proj": "q_proj k_proj v_proj"}
_GATED = _QKV | {"gate_up_proj": "gate_proj up_proj"}
"""What vLLM calls a fused linear -> the modules of Hugging Face that are in it, in the order of its rows."""
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
    "head_dim": _EITHER,
    "tied": _EITHER,
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


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture of Hugging Face.

    `accepts` are the features in which it differs from `PLAIN`; `names` the modules in which it differs from Llama and its
    like, by Megatron's names, several for a fused one; `layer` is the prefix of a layer; `positions` are rows that its
    table of positions has before the first position. `approximates` are features that it computes otherwise: the values of them
    that are written nevertheless, and what differs. `config_class` and `architecture` are transformers' own, whose code has
    the epsilon of the norms of latents as a constant, `latent_epsilon`. `fused` are the linears that engines fuse, where all
    modules of one are there: vLLM's `packed_modules_mapping` (engines.py; tests/support/vllm_models.json has what vLLM says).
    """

    name: str
    config_class: str
    architecture: str
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    approximates: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    layer: str = "model.layers.{}."
    positions: int = 0
    latent_epsilon: float | None = None
    fused: Mapping[str, str] = field(default_factory=lambda: _GATED)

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


_SPARSE = ("every layer", "all but the first layers", "some layers")
_GELU = ("gelu", "gelu_tanh")
_DEEPSEEK: dict[str, tuple[Any, ...]] = {
    "attention": ("multi-latent",),
    "qk norm": (True,),
    "rope scaling": ("none", "yarn"),
    "experts": ("every layer", "all but the first layers"),
    "shared": ("yes",),
    "router scale": _EITHER,
}
_FUSED_LATENT = {
    "gate_up_proj": "gate_proj up_proj",
    "fused_qkv_a_proj": "q_a_proj kv_a_proj_with_mqa",
}
_MAMBA = {
    "norm": "norm",
    "mixer.in_proj": "mixer.in_proj",
    "mixer.out_proj": "mixer.out_proj",
    "mixer": "mixer",
    "mixer.norm": "mixer.norm",
    "mixer.conv1d": "mixer.conv1d",
    "input_layernorm": "norm",
    "pre_mlp_layernorm": "norm",
    "self_attention.linear_qkv": "mixer.q_proj mixer.k_proj mixer.v_proj",
    "self_attention.linear_proj": "mixer.o_proj",
    "self_attention.core_attention": "mixer",
    "mlp": "mixer.gate_proj mixer.up_proj mixer.down_proj",
    "mlp.router": "mixer.gate",
    "mlp.experts": "mixer.experts.{}.gate_proj mixer.experts.{}.up_proj mixer.experts.{}.down_proj",
    "mlp.shared_experts": "mixer.shared_experts.gate_proj mixer.shared_experts.up_proj mixer.shared_experts.down_proj",
    "embedding.word_embeddings": "backbone.embeddings",
    "decoder.final_norm": "backbone.norm_f",
}

FAMILIES = (
    Family("Llama", "LlamaConfig", "LlamaForCausalLM"),
    Family("Mistral", "MistralConfig", "MistralForCausalLM", {"window": ("every layer",)}),
    Family("Qwen2", "Qwen2Config", "Qwen2ForCausalLM", {"qkv bias": (True,), "head_dim": (False,), "window": ("no layer",)}),
    Family("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", {"qk norm": (True,)}),
    Family(
        "Nemotron",
        "NemotronConfig",
        "NemotronForCausalLM",
        {
            "norm": ("LayerNorm",),
            "zero centred": (True,),
            "mlp": ("squared_relu",),
            "partial rotary": _EITHER,
            "rope scaling": ("none", "linear"),
        },
    ),
    Family(
        "OPT",
        "OPTConfig",
        "OPTForCausalLM",
        {
            "norm": ("LayerNorm",),
            "mlp": (*_GELU, "relu"),
            "position": ("learned_absolute",),
            "bias": (True,),
            "qkv bias": (True,),
            "head_dim": (False,),
            "attention": ("multi-head",),
        },
        {
            "input_layernorm": "self_attn_layer_norm",
            "pre_mlp_layernorm": "final_layer_norm",
            "self_attention.linear_proj": "self_attn.out_proj",
            "mlp": "fc1 fc1 fc2",
            "embedding.word_embeddings": "model.decoder.embed_tokens",
            "embedding.position_embeddings": "model.decoder.embed_positions",
            "decoder.final_layernorm": "model.decoder.final_layer_norm",
        },
        layer="model.decoder.layers.{}.",
        positions=2,
    ),
    Family(
        "StarCoder2",
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        {
            "norm": ("LayerNorm",),
            "mlp": _GELU,
            "bias": (True,),
            "qkv bias": (True,),
            "head_dim": (False,),
            "window": ("no layer", "every layer"),
        },
        {"mlp": "mlp.c_fc mlp.c_fc mlp.c_proj"},
    ),
    Family(
        "Mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        {"experts": ("every layer",), "window": ("no layer", "every layer")},
        {
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts": "block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3 block_sparse_moe.experts.{}.w2",
        },
    ),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "qkv bias": _EITHER,
            "head_dim": (False,),
            "experts": _SPARSE,
            "shared": ("gated",),
            "router": ("softmax of all", "softmax of the chosen"),
            "topk": ("one", "several"),
        },
    ),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "qk norm": (True,),
            "experts": _SPARSE,
            "router": ("softmax of all", "softmax of the chosen"),
            "topk": ("one", "several"),
        },
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _DEEPSEEK
        | {
            "router": ("sigmoid",),
            "expert bias": (True,),
            "groups": ("none", by_the_best(2)),
            "topk": ("several",),
        },
        _LATENT,
        latent_epsilon=1e-6,
        fused=_FUSED_LATENT,
    ),
    Family(
        "DeepSeek-V2",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _DEEPSEEK
        | {
            "router": ("softmax of all",),
            "groups": ("none", by_the_best(1)),
            "topk": ("one", "several"),
        },
        _LATENT,
        # The published DeepSeek-V2 chooses so, and megatron-core cannot: 6 experts of 3 groups are 2 of each.
        {
            "groups": (
                tuple(map(by_the_best, range(2, 65))),
                "transformers and engines choose the groups of DeepSeek-V2's experts by the best expert of each, as the "
                "published model does; megatron-core by the sum of the best topk / group_topk: some tokens go to other experts "
                "than in training with it, and than in the fidelity figures",
            )
        },
        latent_epsilon=1e-6,
        fused=_FUSED_LATENT,
    ),
    Family(
        "Nemotron-H",
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "hybrid": (True,),
            "position": ("none",),
            "mlp": ("squared_relu",),
            "experts": (*_SPARSE, "no layer"),
            "router": ("sigmoid",),
            "expert bias": (True,),
            "groups": ("none", by_the_best(2)),
            "router scale": _EITHER,
            "shared": ("yes",),
        },
        _MAMBA,
        layer="backbone.layers.{}.",
    ),
)


def family_of(config: ModelConfig) -> Family | None:
    """The first architecture that expresses every feature of the model, or None."""
    return next((family for family in FAMILIES if not family.missing(config)), None)


def nearest_family(config: ModelConfig) -> Family:
    """The architecture that lacks fewest of the model's features; its names stand for the logical projections."""
    return family_of(config) or min(_alike(config), key=lambda family: len(family.missing(config)))


def _alike(config: ModelConfig) -> list[Family]:
    """The architectures whose names cover the model's modules."""
    kinds = {name for name in ("attention", "hybrid", "position") if config.features[name] not in PLAIN[name]}
    found = [family for family in FAMILIES if all(config.features[name] in family.expressed(name) for name in kinds)]
    return found or list(FAMILIES)
