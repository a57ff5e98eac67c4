"""The names of one model in Megatron and in Hugging Face, as data.

Inner names are megatron-core's local ones, one key per layer (`decoder.layers.3.self_attention.linear_qkv.weight`) and per
expert (`decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight`). Where a checkpoint has them: places.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mptq.arch.config import ModelConfig
from mptq.arch.fusion import Fusion


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a layer: its Megatron name, its Hugging Face modules, and how its rows belong to them.

    `keys` are the tensors, equal parts of its rows, in which a Megatron model that ModelOpt compressed stores the weight.
    `path` is the linear's module in megatron-core's layer where that is not its name: checkpoints number experts globally.
    `expert` is the number of the expert that it belongs to.
    """

    megatron: str
    hf: tuple[str, ...]
    fusion: Fusion
    in_features: int
    keys: tuple[str, ...] = ("weight",)
    path: str = ""
    expert: int | None = None

    @property
    def kind(self) -> str:
        """The last part of its name, the same for every expert: `linear_fc1`."""
        return self.megatron.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The linear's module in megatron-core's layer."""
        return self.path or self.megatron

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the fused weight."""
        return sum(self.fusion.rows), self.in_features

    @property
    def members(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """Hugging Face module and [out, in] of each logical projection."""
        return tuple((name, (rows, self.in_features)) for name, rows in zip(self.hf, self.fusion.rows, strict=True))

    def crosses(self, block: int | None) -> bool:
        """Whether square blocks of the fused matrix cross projections, so that it and they have different scales."""
        return block is not None and not self.fusion.aligned(block)

    def fits(self, unit: tuple[int, int]) -> bool:
        """Whether every projection of the group is whole multiples of `unit` in rows and columns."""
        return all(rows % unit[0] == 0 and columns % unit[1] == 0 for _, (rows, columns) in self.members)


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that keeps its precision: inner name, Hugging Face name, and the rows that Hugging Face keeps.

    `key` is its key in a Megatron checkpoint where that is not the inner name: megatron-core's local layer spec stores
    its norms under the names of Transformer Engine's fused linears.
    """

    megatron: str
    hf: str
    shape: tuple[int, ...]
    hf_rows: int
    key: str = ""

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape without the rows of the vocabulary's padding."""
        return self.hf_rows, *self.shape[1:]


CORE_ATTENTION = "self_attention.core_attention"
"""The module of a layer that sees K and V as the cache holds them: after the rotary embedding."""


def layer_linears(config: ModelConfig) -> tuple[Linear, ...]:
    """The linears of one layer, in the order of the forward pass."""
    heads_per_group = config.num_attention_heads // config.num_query_groups
    qkv = Fusion(config.num_query_groups, (heads_per_group * config.head_dim, config.head_dim, config.head_dim))
    plain = Fusion(1, (config.hidden_size,))
    attention = (
        Linear(
            "self_attention.linear_qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            qkv,
            config.hidden_size,
        ),
        Linear("self_attention.linear_proj", ("self_attn.o_proj",), plain, config.num_attention_heads * config.head_dim),
    )
    names = config.family.mlp
    if not config.num_experts:
        return attention + _mlp("mlp", names, config.hidden_size, config.ffn_hidden_size)
    experts = (
        _mlp(
            f"mlp.experts.experts.{expert}",
            tuple(name.format(expert) for name in names),
            config.hidden_size,
            config.moe_ffn_hidden_size,
            expert,
        )
        for expert in range(config.num_experts)
    )
    return attention + tuple(linear for expert in experts for linear in expert)


def _mlp(megatron: str, hf: tuple[str, ...], hidden: int, ffn: int, expert: int | None = None) -> tuple[Linear, Linear]:
    """The two linears of an MLP, dense or an expert; `hf` names its gate, up and down."""
    gate, up, down = hf
    path = megatron if expert is None else f"mlp.experts.local_experts.{expert}"
    return (
        Linear(
            f"{megatron}.linear_fc1",
            (gate, up),
            Fusion(1, (ffn, ffn)),
            hidden,
            ("weight_w", "weight_v"),
            f"{path}.linear_fc1",
            expert,
        ),
        Linear(f"{megatron}.linear_fc2", (down,), Fusion(1, (hidden,)), ffn, path=f"{path}.linear_fc2", expert=expert),
    )


def layer_copies(config: ModelConfig) -> tuple[Copy, ...]:
    """The tensors of one layer that keep their precision.

    Matrices among them (the router) are linears to engines, which expect them in FP8 unless they are excluded by name.
    """
    hidden = config.hidden_size
    norms = (
        Copy(
            "input_layernorm.weight",
            "input_layernorm.weight",
            (hidden,),
            hidden,
            "self_attention.linear_qkv.layer_norm_weight",
        ),
        Copy(
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            (hidden,),
            hidden,
            "mlp.linear_fc1.layer_norm_weight",
        ),
    )
    if not config.num_experts:
        return norms
    router = f"{config.family.router}.weight"
    return (*norms, Copy("mlp.router.weight", router, (config.num_experts, hidden), config.num_experts))


def outer_copies(config: ModelConfig) -> tuple[Copy, ...]:
    """The tensors outside the layers; the first stands before them, the others after."""
    hidden, padded, vocab = config.hidden_size, config.padded_vocab_size, config.vocab_size
    copies = [
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", (padded, hidden), vocab),
        Copy("decoder.final_layernorm.weight", "model.norm.weight", (hidden,), hidden),
    ]
    if not config.tied_embeddings:
        copies.append(Copy("output_layer.weight", "lm_head.weight", (padded, hidden), vocab))
    return tuple(copies)


def megatron_layer(index: int) -> str:
    """Prefix of a layer's inner names."""
    return f"decoder.layers.{index}."


def hf_layer(index: int) -> str:
    """Prefix of a layer's Hugging Face names."""
    return f"model.layers.{index}."
