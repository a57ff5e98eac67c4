"""megatron-core's layer, built without Transformer Engine, GPU or process groups."""

import pytest
import torch
from torch.nn.functional import linear, silu

from mptq.errors import UnsupportedModelError
from mptq.layers.attention import CoreAttention
from mptq.layers.norm import Norm
from mptq.layers.transformer_config import transformer_config
from mptq.layers.transformer_layer import build_layer
from mptq.model.tensors import layer_copies, layer_linears
from tests.support.models import ARGS, FAMILY_ARGS, HYBRID, LATENT, MOE_ARGS, OSS_ARGS, TENSORS, model


def filled(fields, dtype):
    """A layer with random weights in memory."""
    config = model(fields, {name: type(spec)(name, dtype, spec.shape) for name, spec in TENSORS.items()})
    layer = build_layer(config, 0)
    torch.manual_seed(0)
    weights = {name: torch.randn(weight.shape).to(weight.dtype) / 8 for name, weight in layer.named_parameters()}
    layer.load_state_dict(weights, assign=True)
    return config, layer.eval()


RUN = {name: args for name, args in FAMILY_ARGS.items() if name != "Nemotron-H"} | {"gpt-oss": OSS_ARGS, "latent": LATENT}


@pytest.mark.parametrize("fields", RUN.values(), ids=RUN)
def test_names_and_shapes_match_the_tables(fields):
    """For every architecture, megatron-core's layer has the tensors that `layer_linears` and `layer_copies` list."""
    assert not torch.distributed.is_initialized()
    config = model(fields)
    for index in range(config.num_layers):
        layer = build_layer(config, index)
        found = {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}
        expected = {f"{part.module}.weight": part.shape for part in layer_linears(config, index)}
        assert found == expected | {copy.parameter: copy.shape for copy in layer_copies(config, index)}
        assert all(weight.is_meta for weight in layer.parameters())


def test_layers_of_a_hybrid_model_that_can_be_built():
    config = model(HYBRID)
    for index in (1, 2, 4):
        found = {name: tuple(weight.shape) for name, weight in build_layer(config, index).state_dict().items()}
        expected = {f"{part.module}.weight": part.shape for part in layer_linears(config, index)}
        assert found == expected | {copy.parameter: copy.shape for copy in layer_copies(config, index)}


def experts_by_hand(mlp, hidden, topk):
    """Mixtral: softmax over each token's largest logits, weighted sum of those experts; one token at a time."""
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
def test_mixture_of_experts_equals_mixtral(router_dtype):
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


def attention_by_hand(query, key, value, window, sinks):
    """Softmax over visible keys and the head's sink, which has no value; one query at a time."""
    length, sequences, heads, dim = query.shape
    repeats = heads // key.shape[2]
    out = torch.zeros(length, sequences, heads, value.shape[-1])
    for place, sequence, head in torch.cartesian_prod(*map(torch.arange, (length, sequences, heads))).tolist():
        seen = slice(0 if window is None else max(0, place - window), place + 1)
        scores = key[seen, sequence, head // repeats] @ query[place, sequence, head] / dim**0.5
        total = scores.exp().sum() + (0 if sinks is None else sinks[head].exp())
        out[place, sequence, head] = (scores.exp() / total) @ value[seen, sequence, head // repeats]
    return out.flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 0])
@pytest.mark.parametrize("softmax", ["vanilla", "off-by-one", "learnable"])
@torch.no_grad()
def test_core_attention_is_a_softmax_over_visible_keys(groups, window, softmax):
    """off-by-one is a sink of 0, which adds 1 to the denominator."""
    fields = ARGS | {"num_query_groups": groups, "window_size": None if window is None else (window, 0)}
    config = model(fields | {"softmax_type": softmax}, {name: type(s)(name, "float32", s.shape) for name, s in TENSORS.items()})
    with torch.device("meta"):  # as layers are built
        attention = CoreAttention(transformer_config(config))
    torch.manual_seed(0)
    query, key, value = torch.randn(8, 2, 4, 16), torch.randn(8, 2, groups, 16), torch.randn(8, 2, groups, 16)
    sinks = torch.zeros(4) if softmax == "off-by-one" else None
    if softmax == "learnable":
        sinks = torch.randn(4)
        attention.load_state_dict({"softmax_offset": sinks}, assign=True)
    found = attention(query, key, value)
    assert torch.allclose(found, attention_by_hand(query, key, value, window, sinks), atol=1e-5)


@pytest.mark.parametrize("skip", [None, 2, [1, 0]])
def test_which_layers_have_a_window(skip):
    config = model(ARGS | {"window_size": (7, 0), "window_attn_skip_freq": skip})
    windows = [build_layer(config, index).self_attention.core_attention.window for index in (0, 1)]
    assert windows == [[7, 0], [7, 0] if skip is None else None]


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_norms_by_hand(kind, centred):
    config = model(ARGS | {"normalization": kind, "apply_layernorm_1p": centred, "norm_epsilon": 0.01})
    norm = Norm(transformer_config(config), 64, eps=config.norm_epsilon)
    torch.manual_seed(0)
    for weight in norm.parameters():
        weight.copy_(torch.randn(64))
    x = torch.randn(3, 64).bfloat16()
    exact = x.double() - (x.double().mean(-1, keepdim=True) if kind == "LayerNorm" else 0)
    exact = exact / (exact.square().mean(-1, keepdim=True) + 0.01).sqrt() * (norm.weight.double() + centred)
    exact = exact + (norm.bias.double() if kind == "LayerNorm" else 0)
    assert torch.allclose(norm(x).double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("fields", RUN.values(), ids=RUN)
@torch.no_grad()
def test_every_layer_runs_once_its_weights_are_loaded(fields):
    """Once its tensors are loaded, nothing of a layer is left on the meta device."""
    from mptq.layers.forward import run_layer

    config = model(fields)
    for index in range(config.num_layers):
        layer = build_layer(config, index)
        torch.manual_seed(index)
        weights = {name: (torch.randn(weight.shape) / 8).to(weight.dtype) for name, weight in layer.state_dict().items()}
        layer.load_state_dict(weights, assign=True)
        hidden = torch.randn(2, 6, config.hidden_size).bfloat16()
        out = run_layer(layer.eval(), config, hidden)
        assert (out.shape, out.dtype, out.device.type) == (hidden.shape, torch.bfloat16, "cpu")
        assert out.isfinite().all()
        # Causal: later tokens do not affect earlier ones.
        changed = hidden.clone()
        changed[:, -1] += 1
        again = run_layer(layer, config, changed)
        assert torch.allclose(again[:, :-1].float(), out[:, :-1].float(), atol=0.02, rtol=0.02)
        assert not torch.equal(again[:, -1], out[:, -1])


def test_a_model_that_megatron_core_rejects_is_a_one_line_error():
    config = model(MOE_ARGS, moe_router_enable_expert_bias=True)  # supported for sigmoid scores only
    with pytest.raises(UnsupportedModelError, match=r"^megatron-core cannot build this model: .*Expert bias") as caught:
        transformer_config(config)
    assert "\n" not in str(caught.value)
