"""The tensors of a model: their names in Megatron and in Hugging Face, and their shapes.

Inner names are megatron-core's local ones, with one key per layer (`decoder.layers.3.self_attention.linear_qkv.weight`)
and per expert (`decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight`). checkpoint_keys.py finds them in a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from mptq.model.architectures.family import Family
from mptq.model.architectures.registry import nearest_family
from mptq.model.config import LayerKind, MLAConfig, ModelConfig
from mptq.model.fused import Fusion

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear of a layer: its Megatron name, its Hugging Face modules, and how its rows are divided among them.

    `keys` are the tensors in which a Megatron model compressed by ModelOpt stores the weight, with `key_rows` rows
    each. `path` is the linear's module in megatron-core's layer if it differs from its name: checkpoints number experts
    globally. `expert` is the number of the expert that it belongs to, if any. `bias` is whether it has a bias. `parts`
    are the rows of the tensors of `keys` if these are not equal.
    """

    megatron: str
    hf: tuple[str, ...]
    fusion: Fusion
    in_features: int
    keys: tuple[str, ...] = ("weight",)
    path: str = ""
    expert: int | None = None
    bias: bool = False
    parts: tuple[int, ...] = ()

    @property
    def key_rows(self) -> tuple[int, ...]:
        """Number of rows of each tensor of `keys`: equal unless `parts` is set."""
        return self.parts or (self.shape[0] // len(self.keys),) * len(self.keys)

    @property
    def kind(self) -> str:
        """The last part of its name, such as `linear_fc1`, which is the same for every expert."""
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
        """Whether square blocks of the fused matrix span projections, which then have different scales when split."""
        return block is not None and not self.fusion.aligned(block)

    def fits(self, unit: tuple[int, int]) -> bool:
        """Whether the rows and columns of every projection, and of each of `parts`, are multiples of `unit`."""
        rows = (*self.fusion.rows, *self.parts)
        return all(count % unit[0] == 0 for count in rows) and self.in_features % unit[1] == 0


@dataclass(frozen=True, slots=True)
class UnquantizedTensor:
    """A tensor that keeps its precision: its inner name, its shape, and the Hugging Face tensors that its rows become.

    `rows` is the number of rows in Hugging Face, without vocabulary padding; `before` rows of zeros precede them. With
    `fusion`, the tensor is split. `keys` are the last parts of the names under which a compressed Megatron model stores
    it, if it does so in parts, with `key_rows` rows each. `path` is the parameter in megatron-core's layer if it
    differs from the name. An `exact` tensor keeps its dtype in the forward pass too.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    rows: int
    fusion: Fusion | None = None
    before: int = 0
    keys: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    path: str = ""
    exact: bool = False

    @property
    def key_rows(self) -> tuple[int, ...]:
        """Number of rows of each tensor of `keys`."""
        return self.parts or (self.shape[0] // max(1, len(self.keys)),) * len(self.keys)

    @property
    def parameter(self) -> str:
        """The parameter or buffer in megatron-core's layer."""
        return self.path or self.megatron

    @property
    def by_rows(self) -> bool:
        """Whether the Hugging Face tensor is this matrix as it is, except for padding rows at the end."""
        return len(self.shape) > 1 and self.fusion is None and not self.before

    def for_hf(self, tensor: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
        """Returns the Hugging Face tensors for `tensor`, which can be the rows from `first` on if stored `by_rows`."""
        if self.fusion is not None:
            return self.fusion.split(tensor)
        if not self.before:
            return [tensor[: max(0, self.rows - first)]]
        padded = tensor.new_zeros(self.before + self.rows, *self.shape[1:])
        padded[self.before :] = tensor[: self.rows]
        return [padded]

    @property
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each Hugging Face tensor."""
        if self.fusion is not None:
            return tuple((rows, *self.shape[1:]) for rows in self.fusion.rows)
        return ((self.before + self.rows, *self.shape[1:]),)


CORE_ATTENTION = "self_attention.core_attention"
"""The module that gets K and V after the rotary embedding; in Megatron models it has ModelOpt's quantizers."""
CACHED = ("attention", "mla")
"""Mixers with a KV cache."""


@lru_cache(maxsize=8)
def names(config: ModelConfig) -> Family:
    """Returns the architecture whose names are used for the model's logical projections."""
    return nearest_family(config)


_ORDER = (
    ("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj"),
    ("linear_q_up_proj", "linear_kv_up_proj"),
    ("linear_proj",),
    ("linear_fc1",),
    ("linear_fc2",),
)
"""Kinds of linears: the inputs of one depend on the linears of the earlier kinds."""


MLP_KINDS = ("linear_fc1", "linear_fc2")


def stages(linears: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
    """Divides the linears of a layer into groups, each of which only depends on those before it."""
    found = [[linear for linear in linears if linear.kind in kinds] for kinds in _ORDER]
    assert sum(map(len, found)) == len(linears), "a linear of an unknown kind"
    return [group for group in found if group]


def groups(linears: Sequence[LinearSpec]) -> dict[str, list[LinearSpec]]:
    """Returns the groups of a layer's linears that are measured together, by the kinds in them, in order.

    They are the stages, but that an MLP of experts is one: each expert is quantized as a whole.
    """
    found: dict[str, list[LinearSpec]] = {}
    for stage in stages(linears):
        group = stage
        if any(linear.expert is not None for linear in linears) and stage[0].kind in MLP_KINDS:
            group = [linear for linear in linears if linear.kind in MLP_KINDS]
        found["+".join(dict.fromkeys(linear.kind for linear in group))] = group
    return found


def layer_linears(config: ModelConfig, layer: int) -> tuple[LinearSpec, ...]:
    """Returns the linears of one layer, in the order of the forward pass."""
    return linears_of(config, config.kinds[layer])


def layer_copies(config: ModelConfig, layer: int) -> tuple[UnquantizedTensor, ...]:
    """Returns the tensors of one layer that keep their precision.

    Engines treat matrices among them (the router) as linears, and expect them in FP8 unless they are excluded by name.
    """
    return _copies(config, config.kinds[layer])


@lru_cache(maxsize=16)
def linears_of(config: ModelConfig, kind: LayerKind) -> tuple[LinearSpec, ...]:
    """Returns the linears of a layer of this kind, in the order of the forward pass."""
    return (*_MIXERS[kind.mixer](config), *_FFNS[kind.ffn](config))


@lru_cache(maxsize=16)
def _copies(config: ModelConfig, kind: LayerKind) -> tuple[UnquantizedTensor, ...]:
    biases = (_bias(linear) for linear in linears_of(config, kind) if linear.bias)
    return (*_layer_norms(config, kind), *_OTHERS[kind.mixer](config), *_OTHERS[kind.ffn](config), *biases)


def _none(_config: ModelConfig) -> Iterator[LinearSpec]:
    return iter(())


def _attention(config: ModelConfig) -> Iterator[LinearSpec]:
    heads = config.num_attention_heads // config.num_query_groups
    width = config.head_dim
    hf, hidden = names(config).modules, config.hidden_size
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    fusion = Fusion(config.num_query_groups, (heads * width, width, width))
    yield LinearSpec(qkv, hf(qkv), fusion, hidden, bias=config.bias or bool(config.get("add_qkv_bias")))
    yield LinearSpec(proj, hf(proj), Fusion(1, (hidden,)), config.num_attention_heads * width, bias=config.bias)


def _latent(config: ModelConfig) -> Iterator[LinearSpec]:
    sizes, heads, hidden = config.latent, config.num_attention_heads, config.hidden_size
    assert sizes is not None
    queries = heads * (sizes.qk_dim + sizes.rotary_dim)
    shapes = {"q_down_proj": (sizes.q_rank, hidden)} if sizes.q_rank else {"q_proj": (queries, hidden)}
    shapes["kv_down_proj"] = (sizes.kv_rank + sizes.rotary_dim, hidden)
    if sizes.q_rank:
        shapes["q_up_proj"] = (queries, sizes.q_rank)
    shapes |= {
        "kv_up_proj": (heads * (sizes.qk_dim + sizes.v_dim), sizes.kv_rank),
        "proj": (hidden, heads * sizes.v_dim),
    }
    for name, (rows, columns) in shapes.items():
        megatron = f"self_attention.linear_{name}"
        bias = config.bias and name == "proj"
        yield LinearSpec(megatron, names(config).modules(megatron), Fusion(1, (rows,)), columns, bias=bias)


def _mamba(config: ModelConfig) -> Iterator[LinearSpec]:
    inner, states, heads = _mamba_sizes(config)
    parts = (inner, inner, states, states, heads)
    keys = tuple(f"weight.{name}" for name in ("z", "x", "B", "C", "dt"))
    first, second = "mixer.in_proj", "mixer.out_proj"
    yield LinearSpec(first, names(config).modules(first), Fusion(1, (sum(parts),)), config.hidden_size, keys, parts=parts)
    yield LinearSpec(second, names(config).modules(second), Fusion(1, (config.hidden_size,)), inner)


def _mamba_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the channels of a Mamba layer, those of B and of C (groups * state size), and the number of heads."""
    width = int(config.get("mamba_head_dim"))
    heads = int(config.get("mamba_num_heads") or 2 * config.hidden_size // width)
    return heads * width, int(config.get("mamba_num_groups")) * int(config.get("mamba_state_dim")), heads


def _dense(config: ModelConfig) -> Iterator[LinearSpec]:
    return _mlp(config, "mlp", config.ffn_hidden_size)


def _sparse(config: ModelConfig) -> Iterator[LinearSpec]:
    for expert in range(config.num_experts):
        yield from _mlp(config, "mlp.experts", config.moe_ffn_hidden_size, expert)
    if config.shared_ffn_hidden_size:
        yield from _mlp(config, "mlp.shared_experts", config.shared_ffn_hidden_size)


def _mlp(config: ModelConfig, owner: str, ffn: int, expert: int | None = None) -> Iterator[LinearSpec]:
    """Yields the two linears of an MLP: dense, shared, or of one expert."""
    gate, up, down = (name.format(expert) for name in names(config).modules(owner))
    megatron = path = owner
    if expert is not None:
        megatron, path = f"{owner}.experts.{expert}", f"{owner}.local_experts.{expert}"
    first = ((gate, up), Fusion(1, (ffn, ffn)), ("weight_w", "weight_v"))
    hf, fusion, keys = first if config.gated else ((up,), Fusion(1, (ffn,)), ("weight",))
    hidden, bias = config.hidden_size, config.bias
    yield LinearSpec(f"{megatron}.linear_fc1", hf, fusion, hidden, keys, f"{path}.linear_fc1", expert, bias)
    yield LinearSpec(
        f"{megatron}.linear_fc2", (down,), Fusion(1, (hidden,)), ffn, ("weight",), f"{path}.linear_fc2", expert, bias
    )


_MIXERS = {"attention": _attention, "mla": _latent, "mamba": _mamba, "": _none}
_FFNS = {"mlp": _dense, "moe": _sparse, "": _none}


def _bias(linear: LinearSpec) -> UnquantizedTensor:
    rows = linear.shape[0]
    fusion = None if linear.fusion.plain else linear.fusion
    hf = tuple(f"{name}.bias" for name in linear.hf)
    keys = tuple(key.replace("weight", "bias") for key in linear.keys) if len(linear.keys) > 1 else ()
    return UnquantizedTensor(f"{linear.megatron}.bias", hf, (rows,), rows, fusion, keys=keys, path=f"{linear.module}.bias")


def _same(config: ModelConfig, name: str, shape: tuple[int, ...], module: str = "") -> UnquantizedTensor:
    """Returns the parameter `name`; in Hugging Face its last name is the same, in `module` if that is given."""
    owner, _, last = name.rpartition(".")
    (hf,) = names(config).modules(module or owner)
    return UnquantizedTensor(name, (f"{hf}.{last}",), shape, shape[0])


def _norm(config: ModelConfig, owner: str, size: int) -> Iterator[UnquantizedTensor]:
    yield _same(config, f"{owner}.weight", (size,))
    if config.get("normalization") == "LayerNorm":
        yield _same(config, f"{owner}.bias", (size,))


def _layer_norms(config: ModelConfig, kind: LayerKind) -> Iterator[UnquantizedTensor]:
    hidden = config.hidden_size
    if kind.mixer == "mamba":
        yield from _norm(config, "norm", hidden)
    elif kind.mixer:
        yield from _norm(config, "input_layernorm", hidden)
    if kind.ffn:
        yield from _norm(config, "pre_mlp_layernorm", hidden)


def _no_copies(_config: ModelConfig) -> Iterator[UnquantizedTensor]:
    return iter(())


def _attention_copies(config: ModelConfig) -> Iterator[UnquantizedTensor]:
    if config.get("qk_layernorm"):
        yield from _norm(config, "self_attention.q_layernorm", config.head_dim)
        yield from _norm(config, "self_attention.k_layernorm", config.head_dim)
    if config.get("softmax_type") == "learnable":
        heads = config.num_attention_heads
        (owner,) = names(config).modules(CORE_ATTENTION)
        yield UnquantizedTensor(f"{CORE_ATTENTION}.softmax_offset", (f"{owner}.sinks",), (heads,), heads)


def _latent_copies(config: ModelConfig) -> Iterator[UnquantizedTensor]:
    assert isinstance(config.latent, MLAConfig)
    if config.get("qk_layernorm"):
        if config.latent.q_rank:
            yield from _norm(config, "self_attention.q_layernorm", config.latent.q_rank)
        yield from _norm(config, "self_attention.kv_layernorm", config.latent.kv_rank)


_KERNEL = 4
"""Width of the causal convolution, which is fixed in megatron-core (ssm/mamba_mixer.py)."""


def _mamba_copies(config: ModelConfig) -> Iterator[UnquantizedTensor]:
    inner, states, heads = _mamba_sizes(config)
    channels = inner + 2 * states
    for name, shape in (("weight", (channels, 1, _KERNEL)), ("bias", (channels,))):
        keys = tuple(f"{name}.{part}" for part in ("x", "B", "C"))
        copy = _same(config, f"mixer.conv1d.{name}", shape, "mixer.conv1d")
        yield replace(copy, keys=keys, parts=(inner, states, states), path=f"mixer.conv1d_{name}")
    for name in ("A_log", "D", "dt_bias"):
        yield _same(config, f"mixer.{name}", (heads,))
    yield _same(config, "mixer.norm.weight", (inner,), "mixer.norm")


def _sparse_copies(config: ModelConfig) -> Iterator[UnquantizedTensor]:
    experts, hidden = config.num_experts, config.hidden_size
    yield _same(config, "mlp.router.weight", (experts, hidden))
    (router,) = names(config).modules("mlp.router")
    if config.get("moe_router_enable_expert_bias"):
        name = f"{router}.e_score_correction_bias"
        yield UnquantizedTensor("mlp.router.expert_bias", (name,), (experts,), experts, exact=True)
    if config.bias:
        yield _same(config, "mlp.router.bias", (experts,))
    if config.shared_ffn_hidden_size and config.get("moe_shared_expert_gate"):
        (gate,) = names(config).modules("mlp.shared_experts.gate")
        yield UnquantizedTensor("mlp.shared_experts.gate_weight", (f"{gate}.weight",), (1, hidden), 1)


_OTHERS = {
    "attention": _attention_copies,
    "mla": _latent_copies,
    "mamba": _mamba_copies,
    "moe": _sparse_copies,
    "mlp": _no_copies,
    "": _no_copies,
}


@lru_cache(maxsize=8)
def outer_copies(config: ModelConfig) -> tuple[tuple[UnquantizedTensor, ...], tuple[UnquantizedTensor, ...]]:
    """Returns the tensors before the layers (embeddings first) and after them (final norm first, output layer last)."""
    return tuple(_before(config)), tuple(_after(config))


def _before(config: ModelConfig) -> Iterator[UnquantizedTensor]:
    hidden = config.hidden_size
    yield _vocabulary(config, "embedding.word_embeddings")
    if config.get("position_embedding_type") == "learned_absolute":
        module, count = "embedding.position_embeddings", config.max_position_embeddings
        hf = names(config).modules(module) if names(config).reserved_positions else (module,)
        yield UnquantizedTensor(
            f"{module}.weight", (f"{hf[0]}.weight",), (count, hidden), count, before=names(config).reserved_positions
        )


def _after(config: ModelConfig) -> Iterator[UnquantizedTensor]:
    yield from _norm(config, final_norm(config), config.hidden_size)
    if not config.tied_embeddings:
        yield _vocabulary(config, "output_layer")


def final_norm(config: ModelConfig) -> str:
    """Returns the name of the final norm, the module after the layers."""
    return "decoder.final_norm" if config.get("hybrid_layer_pattern") else "decoder.final_layernorm"


def _vocabulary(config: ModelConfig, owner: str) -> UnquantizedTensor:
    (hf,) = names(config).modules(owner)
    return UnquantizedTensor(
        f"{owner}.weight", (f"{hf}.weight",), (config.padded_vocab_size, config.hidden_size), config.vocab_size
    )


LAYERS = "decoder.layers."
"""Prefix of the inner names of all layers."""


def megatron_layer(index: int) -> str:
    """Returns the prefix of a layer's inner names."""
    return f"{LAYERS}{index}."


def hf_layer(config: ModelConfig, index: int) -> str:
    """Returns the prefix of a layer's Hugging Face names."""
    return names(config).layer.format(index)
