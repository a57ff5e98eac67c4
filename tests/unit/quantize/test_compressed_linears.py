"""Matrices that ModelOpt's quantizers round, one per assignment."""

from collections import Counter

import pytest
import torch

from mptq.errors import CheckpointError
from mptq.quantize import quantizer
from mptq.quantize.compressed_linears import CompressedLinears, drop
from mptq.quantize.modelopt import linear_state
from mptq.recipes.schemes import SCHEMES

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
