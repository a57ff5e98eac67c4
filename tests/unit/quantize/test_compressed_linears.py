"""Matrices that ModelOpt's quantizers round, one per assignment."""

from collections import Counter

import pytest
import torch

from mptq.errors import CheckpointError
from mptq.quantize import quantizer
from mptq.quantize.compressed_linears import CompressedLinears, calibrated_amax, drop
from mptq.quantize.modelopt import convert, linear_state, quant_config
from mptq.recipes.schemes import SCHEMES
from mptq.types import Fp8Weight
from mptq.verification.numbers import Choice, quantized_failures

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")
SHAPE = (260, 160)


def linears(*schemes):
    return CompressedLinears(dict.fromkeys(NAMES, SHAPE), dict(zip(NAMES, schemes, strict=True)), torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_assigned_weights_are_rounded_with_mptqs_kernels(scheme):
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).bfloat16()
    made = linears(scheme, None, scheme).compress(NAMES[2], weight, "w")
    expected, error = quantizer.quantize(weight, scheme, "w")
    assert made.error == error
    assert torch.equal(made.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(made.weight.scale, expected.scale)
    assert made.weight.amax is expected.amax is None or torch.equal(made.weight.amax, expected.amax)
    assert not made.linear.weight.requires_grad
    dequantized = made.linear.weight_quantizer(made.linear.weight)
    assert dequantized.dtype == torch.bfloat16
    assert float((dequantized.float() - weight.float()).norm() / weight.float().norm()) < 0.04


def test_each_linear_has_its_own_scheme():
    found = linears(SCHEMES["block"], None, SCHEMES["mx"])
    made = [found.compress(NAMES[place], torch.ones(SHAPE), "w").weight.scale for place in (0, 2)]
    assert [(tuple(scale.shape), scale.dtype) for scale in made] == [((3, 2), torch.float32), ((260, 5), torch.uint8)]
    assert not found.linear(NAMES[1]).weight_quantizer.is_enabled
    assert found.linear(NAMES[1]).weight.is_meta


def test_a_weight_is_rounded_once_by_modelopts_quantizer(monkeypatch):
    from mptq.quantize.weight_quantizer import WeightQuantizer

    calls, real = Counter(), WeightQuantizer._real_quantize
    monkeypatch.setattr(WeightQuantizer, "_real_quantize", lambda self, inputs: calls.update([id(self)]) or real(self, inputs))
    found = linears(SCHEMES["block"], SCHEMES["block"], SCHEMES["row"])
    for name in NAMES:
        found.compress(name, torch.ones(SHAPE), "w")
    assert sorted(calls.values()) == [1, 1, 1]


def test_the_amax_of_a_group_is_used():
    amax = torch.tensor(7.0)
    made = linears(SCHEMES["tensor"], None, None).compress(NAMES[0], torch.ones(SHAPE), "w", amax)
    assert made.weight.scale == amax / 448
    assert made.weight.amax == amax


def test_a_weight_of_another_rank_has_the_same_state():
    scheme, weight = SCHEMES["block"], torch.randn(SHAPE)
    made = linears(scheme, None, None).compress(NAMES[0], weight, "w")
    received = linears(scheme, None, None).receive(NAMES[0], torch.device("cpu"))
    assert received.error is None
    for part in ("data", "scale", "amax"):
        getattr(received.weight, part).copy_(getattr(made.weight, part))
    (tensors, blob), (others, other) = linear_state(received.linear), linear_state(made.linear)
    assert blob == other
    assert all(torch.equal(tensors[name], others[name]) for name in tensors.keys() | others.keys())


def test_values_that_are_not_finite_are_named():
    weight = torch.ones(SHAPE)
    weight[3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=r"^w \[260, 160\] has 1 values that are NaN or infinite, the first at \[3, 4\]$"):
        linears(SCHEMES["block"], None, None).compress(NAMES[0], weight, "w")


def test_what_has_been_stored_is_freed():
    found = linears(SCHEMES["block"], None, None)
    made = found.compress(NAMES[0], torch.ones(SHAPE), "w")
    drop([made])
    assert not list(found.linear(NAMES[0]).weight_quantizer.buffers())
    assert not list(found.linear(NAMES[0]).parameters())


MSE = Choice("mse")


@pytest.mark.parametrize("scheme", ["tensor", "row", "block"])
def test_mse_is_modelopts_on_a_stock_linear(scheme):
    torch.manual_seed(0)
    weight = (torch.randn(SHAPE) * torch.exp2(torch.randint(-6, 6, (SHAPE[0], 1)).float())).bfloat16()
    scheme = SCHEMES[scheme]
    theirs = torch.nn.Linear(*reversed(SHAPE), bias=False)
    theirs.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    convert(torch.nn.ModuleDict({"linear": theirs}), quant_config(scheme) | {"algorithm": "mse"})
    found = CompressedLinears({NAMES[0]: SHAPE}, {NAMES[0]: scheme}, torch.float32, "mse")
    ours = found.compress(NAMES[0], weight, "w")
    assert torch.equal(ours.weight.data.view(torch.uint8), theirs.weight.data.view(torch.uint8))
    assert torch.equal(ours.weight.scale.flatten(), theirs.weight_quantizer._scale.flatten())
    nearest, error = quantizer.quantize(weight, scheme, "w")
    assert not torch.equal(ours.weight.scale, nearest.scale)
    assert ours.error.relative < error.relative
    assert quantized_failures("w", weight, ours.weight, scheme, weight, MSE) == []
    for other in (ours.weight.scale * 1.0001, ours.weight.scale * 5):
        (failure,) = quantized_failures("w", weight, Fp8Weight(ours.weight.data, other), scheme, weight, MSE)
        assert "one of the 39 factors that the recipe tries" in failure
    moved = ours.weight.data.view(torch.uint8).clone()
    moved[3, 5] ^= 8
    moved = Fp8Weight(moved.view(torch.float8_e4m3fn), ours.weight.scale)
    assert quantized_failures("w", weight, moved, scheme, weight, MSE) == [
        "w: element [3, 5] differs from the source by more than E4M3 rounding error"
    ]


def test_mse_of_a_group_is_that_of_all_its_rows():
    torch.manual_seed(0)
    parts = [torch.randn(64, 32), torch.randn(16, 32) * 3]
    together = calibrated_amax(parts, SCHEMES["tensor"], "mse")
    assert torch.equal(together, calibrated_amax([torch.cat(parts)], SCHEMES["tensor"], "mse"))
    assert together.shape == ()
