"""megatron-core's layer, built without Transformer Engine, GPU or process groups."""

import pytest
import torch
from torch.nn.functional import linear, silu

from mptq.arch.config import from_args
from mptq.arch.layer import build_layer
from mptq.arch.naming import layer_copies, layer_linears
from tests.arch.test_config import ARGS, MOE_ARGS, TENSORS


def filled(fields, dtype):
    """A layer with random weights in memory."""
    config = from_args(fields, "args", {name: type(spec)(name, dtype, spec.shape) for name, spec in TENSORS.items()})
    layer = build_layer(config, 0)
    torch.manual_seed(0)
    weights = {name: torch.randn(weight.shape).to(weight.dtype) / 8 for name, weight in layer.named_parameters()}
    layer.load_state_dict(weights, assign=True)
    return config, layer.eval()


@pytest.mark.parametrize("fields", [ARGS, MOE_ARGS], ids=["dense", "mixture"])
def test_names_and_shapes_are_those_of_the_data(fields):
    assert not torch.distributed.is_initialized()
    config = from_args(fields, "args", TENSORS)
    layer = build_layer(config, 1)
    found = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    expected = {f"{part.module}.weight": part.shape for part in layer_linears(config)}
    assert found == expected | {copy.megatron: copy.shape for copy in layer_copies(config)}
    assert all(weight.is_meta for weight in layer.parameters())


def experts_by_hand(mlp, hidden, topk):
    """Mixtral: each token's largest logits, their softmax, and the sum of those experts, one token at a time."""
    out = torch.zeros_like(hidden)
    for place in torch.cartesian_prod(torch.arange(hidden.shape[0]), torch.arange(hidden.shape[1])).tolist():
        token = hidden[tuple(place)]
        logits, chosen = linear(token, mlp.router.weight).topk(topk)
        for weight, index in zip(logits.softmax(0), chosen.tolist(), strict=True):
            expert = mlp.experts.local_experts[index]
            gate, up = linear(token, expert.linear_fc1.weight).chunk(2)
            out[tuple(place)] += weight * linear(silu(gate) * up, expert.linear_fc2.weight)
    return out


@pytest.mark.parametrize("router_dtype", [None, "fp32", "fp64"])
@torch.no_grad()
def test_mixture_of_experts_is_mixtrals(router_dtype):
    config, layer = filled(MOE_ARGS | {"moe_router_dtype": router_dtype}, "float32")
    hidden = torch.randn(5, 3, config.hidden_size)
    found, bias = layer.mlp(hidden)
    assert bias is None
    expected = experts_by_hand(layer.mlp, hidden, config.moe_topk)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("router_dtype", "dtype"), [(None, torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)])
@torch.no_grad()
def test_router_computes_in_the_dtype_of_the_arguments(router_dtype, dtype):
    config, layer = filled(MOE_ARGS | {"moe_router_dtype": router_dtype}, "bfloat16")
    hidden = torch.randn(5, 3, config.hidden_size).bfloat16()
    assert layer.mlp.router.gating(hidden).dtype == dtype
    out, context = layer(hidden, attention_mask=None)
    assert (out.shape, out.dtype, context) == (hidden.shape, torch.bfloat16, None)
    assert out.isfinite().all()
