"""The model's config, derived from the settings of a checkpoint (settings.py). No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mptq.model.settings.settings import Settings
from mptq.model.settings.supported import DEFAULTS, NOT_RUN, obstacles


@dataclass(frozen=True, slots=True)
class LayerKind:
    """The parts of a layer: a `mixer` ("attention", "mla", "mamba") and an `ffn` ("mlp", "moe"), each "" if absent."""

    mixer: str
    ffn: str


@dataclass(frozen=True, slots=True)
class MLAConfig:
    """The ranks and head dimensions of multi-latent attention; `q_rank` is 0 if the query is not compressed."""

    q_rank: int
    kv_rank: int
    qk_dim: int
    rotary_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True)
class Context:
    """The number of positions of the model and its source.

    `known_from` is "settings" (the setting max_position_embeddings), "yarn" (the length before YaRN times its factor),
    "tokenizer" (its `model_max_length`) or "training" (the sequence length of the training; the model may support
    more).
    """

    length: int
    known_from: str


YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "correction_range_round_to_int",
)
"""Parameters of YaRN, by their names in multi-latent attention; other attention has them with the prefix `yarn_`."""


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """Group-limited routing: the experts form `groups` equal groups, and a token uses experts from `chosen` of them."""

    groups: int
    chosen: int


@dataclass(frozen=True, eq=False)
class ModelConfig:
    """A decoder: the sizes of its tensors, and everything else in `settings`, under megatron-core's names.

    `kinds` has the parts of each layer. `num_experts` is 0 for a dense model; otherwise each expert has the width
    `moe_ffn_hidden_size`. `vocab_size` excludes the padding for tensor parallelism, which `padded_vocab_size` includes.
    `dtype` is that of the embedding, in which the model computes.
    """

    settings: Settings
    kinds: tuple[LayerKind, ...]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    context: Context
    tied_embeddings: bool
    dtype: str
    latent: MLAConfig | None = None
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    features: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Returns a setting, or megatron-core's default if the checkpoint does not specify it."""
        return _setting(self.settings, key)

    @property
    def max_position_embeddings(self) -> int:
        """Number of positions."""
        return self.context.length

    @cached_property
    def yarn(self) -> Mapping[str, Any] | None:
        """YaRN's parameters under the names in `YARN`, or None if the model does not use YaRN."""
        return yarn_of(self.settings)

    @property
    def norm_epsilon(self) -> float:
        """Epsilon of the norms."""
        return float(self.get("layernorm_epsilon"))

    @property
    def gated(self) -> bool:
        """Whether the MLPs have a gate projection as well as an up projection."""
        return bool(self.get("gated_linear_unit"))

    @property
    def bias(self) -> bool:
        """Whether the layers' linears have biases."""
        return bool(self.get("add_bias_linear"))

    @property
    def moe_topk(self) -> int:
        """Number of experts per token."""
        return int(self.get("moe_router_topk")) if self.num_experts else 0

    @property
    def expert_groups(self) -> ExpertGroups | None:
        """The expert groups of group-limited routing, or None if all groups are chosen (as with a single group).

        Source: `group_limited_topk` in megatron/core/transformer/moe/moe_utils.py, which runs if `group_topk` is set.
        """
        groups, chosen = (int(self.get(f"moe_router_{name}") or 0) for name in ("num_groups", "group_topk"))
        return ExpertGroups(groups, chosen) if self.num_experts and 0 < chosen < groups else None

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer that the checkpoint names."""
        named = self.settings.get("tokenizer_model")
        return None if named is None else str(named)

    @property
    def not_run(self) -> list[str]:
        """Features that mptq's forward pass does not support; the weights can still be quantized."""
        return obstacles(NOT_RUN, self.settings)

    @property
    def document(self) -> dict[str, Any]:
        """The config as plain data: the sizes, the features of the architecture, and the settings."""
        sizes = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups head_dim vocab_size
            padded_vocab_size max_position_embeddings tied_embeddings dtype tokenizer num_experts moe_ffn_hidden_size
            shared_ffn_hidden_size"""
        found = {name: getattr(self, name) for name in sizes.split()}
        return found | {"features": dict(self.features), "settings": dict(self.settings.entries)}

    def source(self, key: str) -> str:
        """Returns where a setting comes from, for display."""
        return self.settings.sources.get(key, "megatron-core's default")


def _setting(settings: Settings, key: str) -> Any:
    value = settings.get(key)
    return DEFAULTS.get(key) if value is None else value


def yarn_of(settings: Settings) -> Mapping[str, Any] | None:
    """Returns YaRN's parameters under the names in `YARN`, or None if the model does not use YaRN."""
    latent = bool(settings.get("multi_latent_attention"))
    if _setting(settings, "rope_type" if latent else "position_embedding_type") != "yarn":
        return None
    return {name: _setting(settings, name if latent else f"yarn_{name}") for name in YARN}
