"""The model's config: what the settings of a checkpoint (settings.py) come to. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mptq.model.settings.settings import Settings
from mptq.model.settings.supported import DEFAULTS, NOT_RUN, obstacles


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer is made of: a `mixer` ("attention", "mla", "mamba") and an `ffn` ("mlp", "moe"), "" for none."""

    mixer: str
    ffn: str


@dataclass(frozen=True, slots=True)
class MLAConfig:
    """The ranks and head dimensions of multi-latent attention; `q_rank` is 0 where the query is not compressed."""

    q_rank: int
    kv_rank: int
    qk_dim: int
    rotary_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True)
class Context:
    """How many positions the model has, and what says so.

    `known_from` is "settings" (a setting of that name), "yarn" (the length before YaRN times its factor), "tokenizer" (its
    `model_max_length`) or "training" (the sequence length of the training, which the model may exceed).
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
"""Parameters of YaRN, as multi-latent attention calls them; other attention has them with `yarn_` in front."""


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """Group-limited routing: the experts are in `groups` equal groups, and a token's are in the `chosen` of them."""

    groups: int
    chosen: int


@dataclass(frozen=True, eq=False)
class ModelConfig:
    """A decoder, in the sizes that its tensors have; everything else about it is in `settings`, in megatron-core's words.

    `kinds` says what each layer is. `num_experts` is 0 for a dense model; with experts, each has `moe_ffn_hidden_size`.
    `vocab_size` is the number of rows that mean something: the padding for tensor parallelism is above it. `dtype` is that of
    the embedding, in which the model computes.
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
        """A setting, or megatron-core's default where the checkpoint does not say it."""
        return _setting(self.settings, key)

    @property
    def max_position_embeddings(self) -> int:
        """Positions that the model has."""
        return self.context.length

    @cached_property
    def yarn(self) -> Mapping[str, Any] | None:
        """YaRN's parameters by `YARN`'s names, None where the rotary embedding is another."""
        return yarn_of(self.settings)

    @property
    def norm_epsilon(self) -> float:
        """Epsilon of the norms."""
        return float(self.get("layernorm_epsilon"))

    @property
    def gated(self) -> bool:
        """Whether the MLPs have a gate beside the up projection."""
        return bool(self.get("gated_linear_unit"))

    @property
    def bias(self) -> bool:
        """Whether the layers' linears have biases."""
        return bool(self.get("add_bias_linear"))

    @property
    def moe_topk(self) -> int:
        """Experts that a token goes to."""
        return int(self.get("moe_router_topk")) if self.num_experts else 0

    @property
    def expert_groups(self) -> ExpertGroups | None:
        """The groups that limit the routing; None where every group is chosen, as with one group, which limits nothing.

        Source: `group_limited_topk` in megatron/core/transformer/moe/moe_utils.py, which runs where `group_topk` is given.
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
        """What is in the way of running the model here; its weights can be quantized nevertheless."""
        return obstacles(NOT_RUN, self.settings)

    @property
    def document(self) -> dict[str, Any]:
        """As plain data: the sizes, what distinguishes the architecture, and the settings it comes from."""
        sizes = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups head_dim vocab_size
            padded_vocab_size max_position_embeddings tied_embeddings dtype tokenizer num_experts moe_ffn_hidden_size
            shared_ffn_hidden_size"""
        found = {name: getattr(self, name) for name in sizes.split()}
        return found | {"features": dict(self.features), "settings": dict(self.settings.entries)}

    def source(self, key: str) -> str:
        """Where a setting comes from, for people."""
        return self.settings.sources.get(key, "megatron-core's default")


def _setting(settings: Settings, key: str) -> Any:
    value = settings.get(key)
    return DEFAULTS.get(key) if value is None else value


def yarn_of(settings: Settings) -> Mapping[str, Any] | None:
    """YaRN's parameters by `YARN`'s names, None where the rotary embedding is another."""
    latent = bool(settings.get("multi_latent_attention"))
    if _setting(settings, "rope_type" if latent else "position_embedding_type") != "yarn":
        return None
    return {name: _setting(settings, name if latent else f"yarn_{name}") for name in YARN}
