"""Blocks with power-of-two scales, and what Blackwell's loaders make of block scales."""

import pytest
import torch

from mptq.quantize import quantizer
from mptq.quantize.compressed_linears import CompressedLinears
from mptq.quantize.fp8 import dequantize, encoded, first_out_of_bound, fitted, reference_scale
from mptq.quantize.served import as_served, served_error
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


def test_float32_scales_are_served_as_vllms_function_makes_them():
    torch.manual_seed(0)
    weight = torch.randn(512, 384).bfloat16()
    made, error = quantizer.quantize(weight, FLOATS, "w")
    codes, scale = requantized(made.data, made.scale)
    found = as_served(made, FLOATS)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.data.view(torch.uint8), codes.view(torch.uint8))
    assert not torch.equal(scale, made.scale)
    # A sample of the rows is enough.
    whole = quantizer.measured(weight, found, FLOATS).relative
    assert served_error(weight, made, FLOATS) == pytest.approx(whole, rel=0.02)
    assert whole > 1.2 * error.relative


def test_a_ragged_weight_is_served_like_a_padded_one():
    weight = weights()[:200, :150]
    made, _ = quantizer.quantize(weight, FLOATS, "w")
    padded, _ = quantizer.quantize(torch.nn.functional.pad(weight, (0, 106, 0, 56)), FLOATS, "w")
    found, whole = as_served(made, FLOATS), as_served(padded, FLOATS)
    assert torch.equal(found.scale, whole.scale)
    assert torch.equal(found.data.view(torch.uint8), whole.data[:200, :150].view(torch.uint8))


def test_small_blocks_have_the_smallest_scale_of_the_loader():
    weight = torch.full((128, 128), 1e-7)
    made, _ = quantizer.quantize(weight, FLOATS, "w")
    assert torch.equal(as_served(made, FLOATS).scale, requantized(made.data, made.scale)[1])
    assert as_served(made, FLOATS).scale == 2.0**-22  # 1e-4 / 448, rounded up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [FLOATS, POWERS])
def test_codes_can_be_read_off_the_models_weights(dtype, scheme):
    made, _ = quantizer.quantize(torch.randn(256, 384), scheme, "w")
    found = encoded(dequantize(made, scheme).to(dtype), made.scale, scheme)
    assert torch.equal(found.data.view(torch.uint8), made.data.view(torch.uint8))


def test_powers_of_two_are_served_as_they_are():
    made, _ = quantizer.quantize(weights(), POWERS, "w")
    found = as_served(made, POWERS)
    assert torch.equal(dequantize(found, POWERS), dequantize(made, POWERS))
    assert not POWERS.is_requantized
    assert FLOATS.is_requantized
