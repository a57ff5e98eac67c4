"""The weights of the models of tests/support/zoo.py, and their names in checkpoints.

Each tensor is drawn whole, seeded by its name, layer and expert, and cut to this rank's part, so that weights are the same
in every layout. Norms, biases and routers are drawn so that mistakes with them are visible, and the attention so that it is
far from uniform.
"""

from __future__ import annotations

import hashlib
import re

import torch


def sharded_tensors(model, args):
    """This rank's tensors, as megatron-core describes them to checkpoints."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    stacked = {"singleton_local_shards": False}  # regardless of what is saved: the weights are seeded by these names
    described = model.sharded_state_dict(metadata=_build_sharded_state_dict_metadata(args) | stacked)
    apply_factories(described)
    return [value for value in nested_values(described) if isinstance(value, ShardedTensor)]


def place_of(tensor):
    """Name of a tensor without its layer index, and its indices in stacks: layer, expert."""
    numbers = list(tensor.global_offset[: tensor.prepend_axis_num])
    found = re.search(r"\.layers\.(\d+)\.", tensor.key)
    if found:
        numbers.insert(0, int(found[1]))
    return re.sub(r"\.layers\.\d+\.", ".layers.", tensor.key), numbers


def draw(name, shape, args, row):
    """Draw the whole tensor called `name` in float32."""
    normal = torch.randn(shape)
    name = re.sub(r"\.(z|x|B|C|dt)$", "", name)  # Mamba's tensors, which are saved in parts
    if name.endswith("A_log"):
        return torch.rand(shape).mul(15).add(1).log()
    if name.endswith("dt_bias"):
        return normal * 0.5 - 2
    if name.endswith("mixer.D"):
        return torch.rand(shape) + 0.5
    if name.endswith(("norm.weight", "layer_norm_weight")):
        return torch.rand(shape) + (-0.5 if args.layernorm_zero_centered_gamma else 0.5)
    if name.endswith("bias"):
        return normal * (0.05 if name.endswith("expert_bias") else 0.2)
    if name.endswith("softmax_offset"):
        return normal
    if "embeddings" in name:  # small if tied: otherwise the next token would always be the token itself
        return normal * (1.0 if args.untie_embeddings_and_output_weights else 0.1 / row.embedding_scale**0.5)
    clamp = bool(args.activation_func_clamp_value)  # some values must reach the clamp
    scale = {
        "linear_qkv.weight": 1.3,
        "output_layer.weight": 2.0,
        "linear_fc1.weight": 3.0 if clamp else 1.0,
        "linear_fc2.weight": 0.2 if clamp else 1.0,
    }
    factor = next((factor for suffix, factor in scale.items() if name.endswith(suffix)), 1.0)
    return normal * factor / shape[-1] ** 0.5


def preferences(words, experts, groups):
    """How much each token prefers each expert, [words, experts]: an order of the groups, and one of the experts in each."""
    among = torch.rand(words, groups, 1).argsort(dim=1) / 2
    within = torch.rand(words, groups, experts // groups).argsort(dim=2)
    order = (among + within).flatten(1)
    return order - order.mean(dim=1, keepdim=True)


def tell_experts(name, tensor, args):
    """Change `tensor` so that experts are chosen by wide margins: rounding must not route a token to another one.

    The first coordinates of each token's embedding are large and determine its experts; the layers hardly change them, and
    every router reads them.
    """
    experts = args.num_experts
    if name.endswith("word_embeddings.weight"):
        tensor[:, :experts] = preferences(len(tensor), experts, args.moe_router_num_groups or 1)
    if name.endswith("router.weight"):
        tensor *= 0.03
        tensor[:, :experts] += torch.eye(experts)
    if name.endswith(("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")):
        tensor[:experts] = 1
    if re.search(r"\.(linear_proj|linear_fc2|out_proj)\.(weight|bias)$", name):
        tensor[:experts] *= 0.05


@torch.no_grad()
def fill(model, args, row):
    """Fill every tensor of this rank with its part of the drawn one, rounded to BF16."""
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    for tensor in sharded_tensors(model, args):
        name, numbers = place_of(tensor)
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{name} {numbers}".encode()).digest()[:8], "big") >> 1)
        stacked = tensor.prepend_axis_num
        whole = draw(name, tensor.global_shape[stacked:], args, row)
        if args.num_experts:
            tell_experts(name, whole, args)
        for dim, (offset, size) in enumerate(zip(tensor.global_offset[stacked:], tensor.data.shape, strict=True)):
            whole = whole.narrow(dim, offset, size)
        tensor.data.copy_(whole if name.endswith("expert_bias") else whole.bfloat16())
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def to_bfloat16(model):
    """Round what is BF16 in training: everything except the bias of experts, which megatron-core keeps in float32."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    model.bfloat16()
    for name, buffer in kept.items():
        model.get_buffer(name).data = buffer


def te_key(key, keys):
    """Transformer Engine's name for a tensor that the local layers call `key`; `keys` are those of the whole model.

    Its norms are part of the linear that follows, except before experts. In checkpoints the same holds for the local layers,
    except in latent attention, and the norm before experts is part of the linear too.
    """
    found = re.match(r"(.*\blayers\.(?:\d+\.)?(?:transformer_layer\.)?)(.*)", key)
    if not found:
        return key
    layer, rest = found.groups()
    renamed = {
        "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    if f"{layer}self_attention.linear_q_up_proj.weight" in keys:  # otherwise it is the norm of each head
        renamed["self_attention.q_layernorm.weight"] = "self_attention.linear_q_up_proj.layer_norm_weight"
    if f"{layer}mlp.router.weight" in keys:
        del renamed["pre_mlp_layernorm.weight"]
        renamed["mlp.linear_fc1.layer_norm_weight"] = "pre_mlp_layernorm.weight"
    return layer + renamed.get(rest, rest)


def name_as_te(model):
    """Make `model` describe its tensors to checkpoints by Transformer Engine's names."""
    describe = model.sharded_state_dict

    def renamed(*args, **kwargs):
        described = describe(*args, **kwargs)
        keys = {value.key for value in described.values()}
        for value in described.values():
            value.key = te_key(value.key, keys)
        return described

    model.sharded_state_dict = renamed
