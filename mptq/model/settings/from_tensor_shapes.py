"""Settings derived from the names and shapes of a checkpoint's tensors. No torch.

Settings that shapes do not determine (heads and groups, rotary base, epsilon, activation function) stay absent. Names
are those of megatron-core's `sharded_state_dict`: layers and experts are stacked in leading dimensions or numbered in
the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mptq.types import TensorSpec

_LAYER = re.compile(r"(?P<block>decoder|mtp)\.layers\.(?:(?P<index>\d{1,6})\.)?(?P<name>.+)")
_EXPERT = re.compile(r"\bexperts\.(?:experts|local_experts)\.\d+\.(.+)|\bexperts\.(linear_fc[12]\.weight)\d+")
_PREFIX = re.compile(r"(?:(?:model|module)\d*\.)+")
_FOREIGN = ("optimizer.", "_quantizer.", "_extra_state")
_MOST_LAYERS = 10_000  # larger stacks are not from a real model, and would only waste memory

Shape = tuple[int, ...]
Layer = dict[str, Shape]


@dataclass
class _Tensors:
    """Tensor shapes outside the layers and of each layer (stacks are split), and the numbers of MTP layers."""

    outer: Layer = field(default_factory=dict)
    layers: dict[int, Layer] = field(default_factory=dict)
    mtp: set[int] = field(default_factory=set)


def from_tensors(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Returns the settings that the model tensors among `specs` determine; empty if no names are known."""
    tensors = _sorted_out(specs.values())
    if not tensors.layers:
        return _outer(tensors.outer)
    layers = [tensors.layers[index] for index in sorted(tensors.layers)]
    found = {"num_layers": len(layers)} | _outer(tensors.outer) | _norms(tensors.outer, layers)
    found |= _attention(layers) | _dense(layers) | _experts(layers) | _pattern(layers)
    return found | {"mtp_num_layers": len(tensors.mtp) or None}


def _sorted_out(specs: Iterable[TensorSpec]) -> _Tensors:
    tensors = _Tensors()
    for spec in specs:
        if any(word in spec.name for word in _FOREIGN):
            continue
        key = _PREFIX.sub("", spec.name, count=1) if _PREFIX.match(spec.name) else spec.name
        match = _LAYER.fullmatch(key)
        if match is None:
            tensors.outer[key] = spec.shape
            continue
        stacked = match["index"] is None
        if stacked and not (spec.shape and spec.shape[0] <= _MOST_LAYERS):
            continue
        indices = range(spec.shape[0]) if stacked else [int(match["index"])]
        shape = spec.shape[1:] if stacked else spec.shape
        if match["block"] == "mtp":
            tensors.mtp.update(indices)
            continue
        for index in indices:
            _add(tensors.layers.setdefault(index, {}), match["name"], shape)
    return tensors


def _add(layer: Layer, name: str, shape: Shape) -> None:
    """Adds a tensor to a layer; tensors of experts are combined under one name with a stacked shape."""
    expert = _EXPERT.search(name)
    if expert is None:
        layer[name] = shape
        return
    merged = f"{name[: expert.start()]}experts.experts.{expert[1] or expert[2]}"
    known = layer.get(merged)
    layer[merged] = (known[0] + 1 if known else 1, *shape)


def _outer(outer: Layer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    words = _first([outer], "embedding.word_embeddings.weight")
    if words:
        found |= {"padded_vocab_size": words[0], "hidden_size": words[1]}
        found["share_embeddings_and_output_weights"] = "output_layer.weight" not in outer
    positions = _first([outer], "embedding.position_embeddings.weight")
    if positions:
        found |= {"position_embedding_type": "learned_absolute", "max_position_embeddings": positions[0]}
    return found


def _norms(outer: Layer, layers: list[Layer]) -> dict[str, Any]:
    names = {name for layer in [outer, *layers] for name in layer if "norm" in name}
    biased = any(name.endswith(("norm.bias", "norm_bias")) for name in names)
    return {"normalization": "LayerNorm" if biased else "RMSNorm"} if names else {}


def _has(layers: list[Layer], *ends: str) -> bool:
    return any(name.endswith(ends) for layer in layers for name in layer)


def _first(layers: list[Layer], *names: str) -> Shape | None:
    """Returns the shape of the first matrix (or stack of matrices) with one of these names."""
    return next((layer[name] for layer in layers for name in names if len(layer.get(name, ())) > 1), None)


def _attention(layers: list[Layer]) -> dict[str, Any]:
    found: dict[str, Any] = {"multi_latent_attention": _has(layers, "kv_up_proj.weight")}
    if _has(layers, "linear_proj.weight", "linear_fc2.weight"):
        found["add_bias_linear"] = _has(layers, "linear_proj.bias", "linear_fc1.bias", "linear_fc2.bias")
    if _has(layers, "linear_qkv.weight"):
        found["add_qkv_bias"] = _has(layers, "linear_qkv.bias")
    if _has(layers, "softmax_offset"):
        found["softmax_type"] = "learnable"
    if found["multi_latent_attention"]:
        return found | _latent(layers)
    if _has(layers, "linear_qkv.weight"):
        found["qk_layernorm"] = _has(layers, "q_layernorm.weight")
    return found


def _latent(layers: list[Layer]) -> dict[str, Any]:
    """Returns the ranks of multi-latent attention and its number of rotary dimensions."""
    found: dict[str, Any] = {}
    q_up = _first(layers, "self_attention.linear_q_up_proj.weight")
    kv_up = _first(layers, "self_attention.linear_kv_up_proj.weight")
    kv_down = _first(layers, "self_attention.linear_kv_down_proj.weight")
    fused_down = _first(layers, "self_attention.linear_qkv_down_proj.weight")
    found["q_lora_rank"] = q_up[1] if q_up else None
    if kv_up:
        found["kv_lora_rank"] = kv_up[1]
        down = kv_down or fused_down
        if down:
            rest = 0 if kv_down or not q_up else q_up[1]
            found["qk_pos_emb_head_dim"] = down[0] - rest - kv_up[1]
    found["qk_layernorm"] = _has(
        layers, "q_layernorm.weight", "kv_layernorm.weight", "q_up_proj.layer_norm_weight", "kv_up_proj.layer_norm_weight"
    )
    return found


def _dense(layers: list[Layer]) -> dict[str, Any]:
    """Returns the width of the dense MLPs, and whether MLPs (of any kind) are gated."""
    found: dict[str, Any] = {}
    fc2 = _first(layers, "mlp.linear_fc2.weight")
    if fc2:
        found["ffn_hidden_size"] = fc2[-1]
    for path in ("mlp.", "mlp.experts.experts.", "mlp.shared_experts."):
        first, second = _first(layers, f"{path}linear_fc1.weight"), _first(layers, f"{path}linear_fc2.weight")
        if _first(layers, f"{path}linear_fc1.weight_w"):
            found["gated_linear_unit"] = True
        elif first and second:
            found["gated_linear_unit"] = first[-2] == 2 * second[-1]
    return found


def _experts(layers: list[Layer]) -> dict[str, Any]:
    shape = _first(layers, "mlp.router.weight")
    if shape is None:
        return {"num_moe_experts": None}
    found: dict[str, Any] = {"num_moe_experts": shape[0]}
    if any("mlp.linear_fc2.weight" in layer for layer in layers):
        found["moe_layer_freq"] = [int("mlp.router.weight" in layer) for layer in layers]
    fc2 = _first(layers, "mlp.experts.experts.linear_fc2.weight")
    if fc2:
        found["moe_ffn_hidden_size"] = fc2[-1]
    shared = _first(layers, "mlp.shared_experts.linear_fc2.weight")
    found["moe_shared_expert_intermediate_size"] = shared[-1] if shared else None
    found["moe_shared_expert_gate"] = _has(layers, "shared_experts.gate_weight")
    found["moe_router_enable_expert_bias"] = _has(layers, "router.expert_bias")
    return found


def _letter(layer: Layer) -> str:
    """Returns the kind of a layer, as in `hybrid_layer_pattern`; a full transformer layer has two letters."""
    kinds = {"M": "mixer.in_proj.weight", "G": "self_attention.in_proj.weight", "+": "kv_up_proj.weight"}
    kinds |= {"*": "linear_qkv.weight", "E": "mlp.router.weight", "-": "mlp.linear_fc2.weight"}
    return "".join(letter for letter, end in kinds.items() if any(name.endswith(end) for name in layer))


def _pattern(layers: list[Layer]) -> dict[str, Any]:
    """Returns the pattern of a hybrid model, whose layers have one part each and are of several kinds."""
    letters = [_letter(layer) for layer in layers]
    hybrid = all(len(letter) == 1 for letter in letters) and len(set(letters)) > 1
    if hybrid or all(letter == "M" for letter in letters):
        return {"hybrid_layer_pattern": "".join(letters), "is_hybrid_model": True}
    return {}
