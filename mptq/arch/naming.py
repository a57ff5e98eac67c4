"""The names of one model in Megatron and in Hugging Face, as data.

Inner names are megatron-core's local ones, one key per layer (`decoder.layers.3.self_attention.linear_qkv.weight`).
Checkpoints stack layers into one tensor, fuse norms into Transformer Engine's linears and split gated fc1 in two; those
spellings are the alternatives of `LAYER_SPELLINGS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mptq.arch.config import ModelConfig
from mptq.arch.fusion import Fusion
from mptq.errors import CheckpointError
from mptq.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a layer: its Megatron module, its Hugging Face modules, and how its rows belong to them.

    `keys` are the tensors, equal parts of its rows, in which a Megatron model that ModelOpt compressed stores the weight.
    """

    megatron: str
    hf: tuple[str, ...]
    fusion: Fusion
    in_features: int
    keys: tuple[str, ...] = ("weight",)

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

    def fits(self, block: int | None) -> bool:
        """Whether engines read every projection of the group in square blocks: all rows and columns are whole blocks."""
        return block is None or all(size % block == 0 for _, shape in self.members for size in shape)


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


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or one layer of a stack, that makes up (some rows of) an inner tensor."""

    key: str
    layer: int | None
    shape: tuple[int, ...]


LAYER_SPELLINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "input_layernorm.weight": (("input_layernorm.weight",), ("self_attention.linear_qkv.layer_norm_weight",)),
    "self_attention.linear_qkv.weight": (("self_attention.linear_qkv.weight",),),
    "self_attention.linear_proj.weight": (("self_attention.linear_proj.weight",),),
    "pre_mlp_layernorm.weight": (("pre_mlp_layernorm.weight",), ("mlp.linear_fc1.layer_norm_weight",)),
    "mlp.linear_fc1.weight": (("mlp.linear_fc1.weight",), ("mlp.linear_fc1.weight_w", "mlp.linear_fc1.weight_v")),
    "mlp.linear_fc2.weight": (("mlp.linear_fc2.weight",),),
}
"""Inner name of a layer's tensor -> how checkpoints spell it: alternatives, each of one or more tensors, by rows."""

DROPPED = {
    "_extra_state": "Transformer Engine's FP8 state, of no meaning outside training",
    "optimizer.": "optimizer state",
    "rng_state": "random number generator state",
    "rerun_state": "rerun state machine",
    "opt_param_scheduler": "learning rate scheduler",
    "common_state": "training arguments, read for the architecture",
    "dataloader": "data loader state",
    "rotary_pos_emb.inv_freq": "recomputed from rotary_base",
}
"""Part of a key -> why it is not in the output."""


def layer_linears(config: ModelConfig) -> tuple[Linear, ...]:
    """The linears of one layer, in the order of the forward pass."""
    heads_per_group = config.num_attention_heads // config.num_query_groups
    qkv = Fusion(config.num_query_groups, (heads_per_group * config.head_dim, config.head_dim, config.head_dim))
    gate_up = Fusion(1, (config.ffn_hidden_size, config.ffn_hidden_size))
    plain = Fusion(1, (config.hidden_size,))
    return (
        Linear(
            "self_attention.linear_qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            qkv,
            config.hidden_size,
        ),
        Linear("self_attention.linear_proj", ("self_attn.o_proj",), plain, config.num_attention_heads * config.head_dim),
        Linear(
            "mlp.linear_fc1",
            ("mlp.gate_proj", "mlp.up_proj"),
            gate_up,
            config.hidden_size,
            ("weight_w", "weight_v"),
        ),
        Linear("mlp.linear_fc2", ("mlp.down_proj",), plain, config.ffn_hidden_size),
    )


def layer_copies(config: ModelConfig) -> tuple[Copy, ...]:
    """The tensors of one layer that keep their precision."""
    hidden = config.hidden_size
    return (
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


def locate(tensors: Mapping[str, TensorSpec], config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Where each inner tensor of the model is in the checkpoint: inner name -> parts, one above the other by rows.

    Raises CheckpointError for a missing tensor, one of a wrong shape, and one that is not part of the model.
    """
    prefix = _prefix(tensors)
    places: dict[str, tuple[Part, ...]] = {}
    for copy in outer_copies(config):
        places[copy.megatron] = _place(tensors, copy.megatron, [(Part(prefix + copy.megatron, None, copy.shape),)])
    shapes: dict[str, tuple[int, ...]] = {f"{linear.megatron}.weight": linear.shape for linear in layer_linears(config)}
    shapes |= {copy.megatron: copy.shape for copy in layer_copies(config)}
    for layer in range(config.num_layers):
        for name, shape in shapes.items():
            inner = megatron_layer(layer) + name
            places[inner] = _place(tensors, inner, list(_layer_candidates(prefix, layer, name, shape)))
    _check_shapes(tensors, places, config)
    _check_all_used(tensors, places)
    return places


def dropped(keys: Iterable[str]) -> dict[str, str]:
    """The keys that the output leaves out, with the reason."""
    return {key: reason for key in keys if (reason := _drop_reason(key)) is not None}


def _drop_reason(key: str) -> str | None:
    return next((reason for part, reason in DROPPED.items() if part in key), None)


def _prefix(tensors: Mapping[str, TensorSpec]) -> str:
    """What stands before `decoder.` in the model's keys: nothing, `model.` or `module.`."""
    anchor = "decoder.final_layernorm.weight"
    found = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor) and _drop_reason(key) is None]
    if len(found) != 1:
        raise CheckpointError(f"the checkpoint has {len(found)} tensors named *{anchor}: no GPT model in it that mptq knows")
    return found[0]


def _layer_candidates(prefix: str, layer: int, name: str, shape: tuple[int, ...]) -> Iterable[tuple[Part, ...]]:
    for spelling in LAYER_SPELLINGS[name]:
        part_shape = (shape[0] // len(spelling), *shape[1:])
        yield tuple(Part(f"{prefix}decoder.layers.{layer}.{word}", None, part_shape) for word in spelling)
        yield tuple(Part(f"{prefix}decoder.layers.{word}", layer, part_shape) for word in spelling)


def _place(tensors: Mapping[str, TensorSpec], inner: str, candidates: list[tuple[Part, ...]]) -> tuple[Part, ...]:
    for parts in candidates:
        if all(part.key in tensors for part in parts):
            return parts
    tried = ", ".join(dict.fromkeys(part.key for parts in candidates for part in parts))
    raise CheckpointError(f"{inner} is not in the checkpoint (looked for {tried}): the checkpoint is incomplete")


def _check_shapes(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[Part, ...]], config: ModelConfig) -> None:
    for inner, parts in places.items():
        for part in parts:
            expected = part.shape if part.layer is None else (config.num_layers, *part.shape)
            if tensors[part.key].shape != expected:
                raise CheckpointError(
                    f"{part.key} has shape {list(tensors[part.key].shape)}, but {config.source} implies {list(expected)} "
                    f"for {inner}: the arguments do not belong to these weights"
                )


def _check_all_used(tensors: Mapping[str, TensorSpec], places: Mapping[str, tuple[Part, ...]]) -> None:
    used = {part.key for parts in places.values() for part in parts}
    unknown = sorted(key for key in tensors if key not in used and _drop_reason(key) is None)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise CheckpointError(f"{shown}: not part of a Llama-like model, so the output would not be this model")
