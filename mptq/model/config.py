"""The model's config: what the settings of a checkpoint (settings.py) come to. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mptq.errors import CheckpointError, UnsupportedModelError
from mptq.model import features
from mptq.model.settings import validate
from mptq.model.settings.settings import OPTIONS, Settings, unsaid
from mptq.model.settings.values import short
from mptq.types import TensorSpec


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
        return _yarn(self.settings)

    @cached_property
    def features(self) -> Mapping[str, Any]:
        """What distinguishes one architecture from another, by name (features.py)."""
        return features.features(self)

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
        return features.obstacles(features.NOT_RUN, self.settings)

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


def model_config(settings: Settings, tensors: Mapping[str, TensorSpec]) -> ModelConfig:
    """The config that `settings` describe; `tensors` give the weights' dtype and the padded vocabulary.

    Raises CheckpointError without a usable architecture or for a value that no model can have, and UnsupportedModelError naming
    every feature that is in the way.
    """
    if not {"num_layers", "hidden_size"} & set(settings):
        raise CheckpointError(
            "the checkpoint does not say its architecture: it has neither run_config.yaml nor Megatron-LM's args; "
            "pass --hf-config DIR or --config key=value"
        )
    untold = unsaid(settings)
    if untold:
        raise CheckpointError(
            "the checkpoint has neither run_config.yaml nor Megatron-LM's args, and its tensors do not tell "
            f"{', '.join(untold)}: pass --hf-config DIR, or each as --config key=value"
        )
    refused = features.obstacles(features.REFUSED, settings)
    if refused:
        raise UnsupportedModelError(
            f"this checkpoint has {'; '.join(refused)}, which mptq does not quantize{features.remedy(settings)}"
        )
    validate.check(settings)
    try:
        return _config(settings, tensors)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the architecture has no usable value for {error}: pass it as --config key=value, or --hf-config DIR"
        ) from error


def _config(settings: Settings, tensors: Mapping[str, TensorSpec]) -> ModelConfig:
    heads, hidden = int(settings["num_attention_heads"]), int(settings["hidden_size"])
    # The optimizer has a copy of every parameter under its own prefix.
    tables = [name for name in tensors if name.endswith("word_embeddings.weight") and not name.startswith("optimizer.")]
    embedding = tensors[tables[0]] if tables else None
    padded = embedding.shape[0] if embedding else int(settings["padded_vocab_size"])
    experts = int(settings.get("num_moe_experts") or 0)
    ffn = int(settings.get("ffn_hidden_size") or 4 * hidden)
    return ModelConfig(
        settings=settings,
        kinds=_kinds(settings),
        num_layers=int(settings["num_layers"]),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=int(settings.get("num_query_groups") or heads),
        head_dim=int(settings.get("kv_channels") or hidden // heads),
        vocab_size=min(int(settings.get("vocab_size") or padded), padded),
        padded_vocab_size=padded,
        context=_context(settings),
        tied_embeddings=bool(settings.get("share_embeddings_and_output_weights")),
        dtype=embedding.dtype if embedding else "bfloat16",
        latent=_latent(settings),
        num_experts=experts,
        moe_ffn_hidden_size=int(settings.get("moe_ffn_hidden_size") or ffn) if experts else 0,
        shared_ffn_hidden_size=int(settings.get("moe_shared_expert_intermediate_size") or 0) if experts else 0,
    )


def _setting(settings: Settings, key: str) -> Any:
    value = settings.get(key)
    return features.DEFAULTS.get(key) if value is None else value


def _yarn(settings: Settings) -> Mapping[str, Any] | None:
    latent = bool(settings.get("multi_latent_attention"))
    if _setting(settings, "rope_type" if latent else "position_embedding_type") != "yarn":
        return None
    return {name: _setting(settings, name if latent else f"yarn_{name}") for name in YARN}


def _context(settings: Settings) -> Context:
    """The number of positions.

    With YaRN it is the length before it times the factor, which engines compute too, whatever the training's length was;
    only the user's own word counts more. Megatron-Bridge and NeMo 2 save no more than the length of the training's sequences.
    """
    key = "max_position_embeddings"
    said, yarn = settings.get(key), _yarn(settings)
    if yarn and yarn["rotary_scaling_factor"] > 1 and settings.sources.get(key) != OPTIONS:
        return Context(round(yarn["original_max_position_embeddings"] * yarn["rotary_scaling_factor"]), "yarn")
    if said:
        return Context(int(said), "settings")
    trained, most = settings.get("seq_length"), settings.get("model_max_length")
    if most and most > (trained or 0):
        return Context(int(most), "tokenizer")
    if not trained:
        raise KeyError(key)
    return Context(int(trained), "training")


def _latent(settings: Settings) -> MLAConfig | None:
    if not settings.get("multi_latent_attention"):
        return None
    names = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    kv_rank, qk_dim, rotary_dim, v_dim = (int(settings[name]) for name in names)
    return MLAConfig(int(settings.get("q_lora_rank") or 0), kv_rank, qk_dim, rotary_dim, v_dim)


_LETTERS = {
    "M": LayerKind("mamba", ""),
    "*": LayerKind("attention", ""),
    "+": LayerKind("mla", ""),
    "-": LayerKind("", "mlp"),
    "E": LayerKind("", "moe"),
}
"""Symbols of a hybrid pattern. Source: megatron/core/models/hybrid/hybrid_layer_allocation.py."""


def _kinds(settings: Settings) -> tuple[LayerKind, ...]:
    layers = int(settings["num_layers"])
    pattern = settings.get("hybrid_layer_pattern")
    if pattern:
        letters = str(pattern).partition("/")[0].replace("|", "")
        if len(letters) != layers or set(letters) - set(_LETTERS):
            raise ValueError(f"hybrid_layer_pattern ({short(repr(letters))} for {layers} layers of {', '.join(_LETTERS)})")
        return tuple(_LETTERS[letter] for letter in letters)
    mixer = "mla" if settings.get("multi_latent_attention") else "attention"
    if not settings.get("num_moe_experts"):
        return (LayerKind(mixer, "mlp"),) * layers
    frequency = settings.get("moe_layer_freq") or 1
    sparse = (
        list(frequency) if isinstance(frequency, list | tuple) else [index % int(frequency) == 0 for index in range(layers)]
    )
    return tuple(LayerKind(mixer, "moe" if experts else "mlp") for experts in sparse)
