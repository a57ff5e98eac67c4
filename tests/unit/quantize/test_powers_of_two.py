"""Blocks with power-of-two scales, and what Blackwell's loaders make of block scales."""

import pytest
import torch

from mptq.quantize import quantizer
from mptq.quantize.compressed_linears import CompressedLinears
from mptq.quantize.fp8 import dequantize, first_out_of_bound, fitted, reference_scale
from mptq.recipes.schemes import SCHEMES
from mptq.verification.numbers import quantized_failures

POWERS, FLOATS = SCHEMES["block-ue8m0"], SCHEMES["block"]


def requantized(data, scale):
    """vLLM's `requant_weight_ue8m0_inplace` (utils/deep_gemm.py: per_block_cast_to_fp8 with use_ue8m0), of whole blocks."""
    rows, columns = data.shape
    values = data.float().view(rows // 128, 128, columns // 128, 128) * scale[:, None, :, None]
    amax = values.abs().amax(dim=(1, 3), keepdim=True).clamp(1e-4)
    found = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    codes = (values * (1 / found)).to(torch.float8_e4m3fn)
    return codes.view(rows, columns), found.view(scale.shape)


def weights():
    torch.manual_seed(0)
    return torch.randn(512, 384).bfloat16() * torch.exp2(torch.randint(-6, 6, (512, 1)).float())


def test_scales_are_the_smallest_powers_of_two_that_fit():
    weight = weights()
    made, error = quantizer.quantize(weight, POWERS, "w")
    amax = weight.float().view(4, 128, 3, 128).abs().amax(dim=(1, 3))
    assert torch.equal(made.scale, torch.exp2(torch.ceil(torch.log2(amax.double() / 448))).float())
    assert torch.equal(made.amax, made.scale * 448)
    expected = weight.float().view(4, 128, 3, 128) / made.scale[:, None, :, None]
    assert torch.equal(made.data.float(), expected.to(torch.float8_e4m3fn).float().view(512, 384))
    assert error.saturated < 1e-3
    assert torch.equal(reference_scale(weight, POWERS), made.scale)
    assert first_out_of_bound(weight, made, POWERS) is None
    assert quantized_failures("w", weight, made, POWERS, weight) == []
    floats, _ = quantizer.quantize(weight, FLOATS, "w")
    assert "scales differ" in quantized_failures("w", weight, floats, POWERS, weight)[0]


EDGES = [(448.0, 448.0), (448.1, 896.0), (224.0, 224.0), (1e-30, 448 * 2.0**-39), (0.0, 448.0)]


@pytest.mark.parametrize(("amax", "expected"), EDGES)
def test_the_largest_magnitude_just_fits(amax, expected):
    assert fitted(torch.tensor(amax), POWERS) == expected


def test_modelopts_linear_has_the_same_numbers():
    weight = weights()
    found = CompressedLinears({"a": weight.shape, "b": weight.shape}, {"a": POWERS, "b": FLOATS}, torch.bfloat16)
    for name, scheme in (("a", POWERS), ("b", FLOATS)):
        ours, (expected, error) = found.compress(name, weight, "w"), quantizer.quantize(weight, scheme, "w")
        assert torch.equal(ours.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(ours.weight.scale, expected.scale)
        assert ours.error == error
    made, expected = found.linear("a"), quantizer.quantize(weight, POWERS, "w")[0]
    assert torch.equal(made.weight_quantizer(made.weight).float(), dequantize(expected, POWERS))


def test_blackwells_loaders_keep_the_numbers_and_spoil_those_of_float32_scales():
    weight = weights()
    errors = {}
    for scheme in (POWERS, FLOATS):
        made, error = quantizer.quantize(weight, scheme, "w")
        data, scale = requantized(made.data, made.scale)
        served = data.float().view(4, 128, 3, 128) * scale[:, None, :, None]
        served = served.view(512, 384)
        errors[scheme.name] = error.relative, float((served - weight.float()).norm() / weight.float().norm())
        if scheme is POWERS:
            assert torch.equal(served, dequantize(made, scheme))
    stored, served = errors["block-ue8m0"]
    assert served == pytest.approx(stored, rel=1e-4)
    stored, spoiled = errors["block"]
    assert spoiled > 1.3 * stored
    assert served < 1.02 * stored
