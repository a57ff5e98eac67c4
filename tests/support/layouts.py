"""The layouts in which checkpoints store a model: inner tensors, renamed, split and stacked."""

import re
from dataclasses import dataclass

import torch

from tests.support.models import inner_shapes

EXPERT = re.compile(r"mlp\.experts\.experts\.(\d+)\.(linear_fc[12])\.(\w+)$")
EXPERTS = {
    "numbered": r"mlp.experts.experts.\1.\2.\3",
    "local": r"mlp.experts.local_experts.\1.\2.\3",
    "grouped": r"mlp.experts.\2.\3\1",
    "grouped twice": r"mlp.experts.experts.\2.\3\1",
    "plain": r"mlp.experts.\1.\2.\3",
}
FUSED_NORMS = {
    r"self_attention\.q_layernorm\.(\w+)$": r"self_attention.linear_q_up_proj.layer_norm_\1",
    r"self_attention\.kv_layernorm\.(\w+)$": r"self_attention.linear_kv_up_proj.layer_norm_\1",
    r"(\d\.)norm\.(\w+)$": r"\1mixer.in_proj.layer_norm_\2",
}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores a model; with `halves`, gate and up (and their biases) are separate tensors."""

    prefix: str = ""
    layers_stacked: bool = False
    experts_stacked: bool = False
    experts: str = "numbered"
    transformer_engine: bool = False
    halves: bool = False


def inner_tensors(config) -> dict[str, torch.Tensor]:
    """Small random integers in BF16 for every tensor of the model, different for each."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(-128, 128, shape, generator=draw).bfloat16() for name, shape in inner_shapes(config).items()}


def stored(config, inner, layout) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that stores the `inner` tensors in this layout."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in inner.items():
        found |= dict(_parts(config, _renamed(name, layout), tensor, layout))
    if layout.experts_stacked:
        found = _stacked(found, r"(experts\.)(\d+)\.", config.num_experts)
    if layout.layers_stacked:
        found = _stacked(found, r"(layers\.)(\d+)\.", config.num_layers)
    return {layout.prefix + name: tensor for name, tensor in found.items()}


def _renamed(name, layout):
    name = EXPERT.sub(EXPERTS[layout.experts], name)
    if not layout.transformer_engine:
        return name
    for pattern, word in FUSED_NORMS.items():
        name = re.sub(pattern, word, name)
    return name


def _parts(config, name, tensor, layout):
    """Yield a tensor as stored: itself, or the parts that megatron-core saves separately."""
    if ".mixer.in_proj.weight" in name or ".mixer.conv1d." in name:
        inner, states = 8 * 16, 2 * 8
        sizes = {"z": inner, "x": inner, "B": states, "C": states, "dt": 8}
        words = list(sizes) if "in_proj" in name else ["x", "B", "C"]
        yield from zip((f"{name}.{word}" for word in words), tensor.split([sizes[word] for word in words]), strict=True)
    elif layout.halves and config.gated and re.search(r"linear_fc1\.(weight|bias)$", name):
        yield from zip((f"{name}_w", f"{name}_v"), tensor.chunk(2), strict=True)
    else:
        yield name, tensor


def _stacked(tensors, number, count):
    """Stack tensors whose keys differ only in a number."""
    groups: dict[str, dict[int, torch.Tensor]] = {}
    found = {}
    for name, tensor in tensors.items():
        match = re.search(number, name)
        if match is None:
            found[name] = tensor
        else:
            groups.setdefault(re.sub(number, r"\1", name), {})[int(match[2])] = tensor
    for name, group in groups.items():
        assert sorted(group) == list(range(count)), f"{name} is not in every one"
        found[name] = torch.stack([group[index] for index in range(count)])
    return found


def read(tensors, parts) -> torch.Tensor:
    """The inner tensor assembled from these places, independently of mptq."""
    return torch.cat([tensors[part.key][part.index] for part in parts])
