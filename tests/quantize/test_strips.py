"""The pass that stands in for ModelOpt's: the same bits as ModelOpt's and the reference's, and its own error, measured."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.errors import CheckpointError
from mptq.quantize import strips
from mptq.quantize.fp8 import decode, dequantize
from mptq.recipe import Scheme
from tests import reference
from tests.quantize.test_modelopt import weights

SCHEMES = {scale: Scheme(scale) for scale in ("block", "row", "tensor", "mx")}
REFERENCES = {"block": reference.block, "row": reference.row, "tensor": reference.tensor}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, params=[1 << 20, 1 << 14], ids=["", "small strips"])
def _strips(request, monkeypatch):
    """Strips of the real size, and so small that every matrix has several."""
    monkeypatch.setitem(strips._STRIP, "cpu", request.param)


def same(found, data, scale):
    return torch.equal(found.data.view(torch.uint8), data.view(torch.uint8)) and torch.equal(found.scale, scale)


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(list(REFERENCES)), DTYPES)
def test_equals_the_reference(weight, kind, dtype):
    weight = weight.clamp(-60000, 60000).to(dtype)
    found, _ = strips.quantize(weight, SCHEMES[kind], "w")
    assert same(found, *REFERENCES[kind](weight.float()))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 99), DTYPES)
def test_microscaling_equals_the_reference(rows, blocks, seed, dtype):
    torch.manual_seed(seed)
    weight = (torch.randn(rows, blocks * 32) * torch.exp2(torch.randint(-9, 9, (rows, 1)).float())).to(dtype)
    weight = weight[: -(-4096 // weight.shape[1])]  # the reference goes element by element
    assert same(strips.quantize(weight, SCHEMES["mx"], "w")[0], *reference.mx(weight.float()))


@settings(max_examples=30, deadline=None)
@given(weights(), st.sampled_from(list(REFERENCES)))
def test_error_is_that_of_the_whole_in_float64(weight, kind):
    found, error = strips.quantize(weight, SCHEMES[kind], "w")
    whole, source = dequantize(found, SCHEMES[kind]).double(), weight.double()
    difference = (whole.float() - weight).double()
    norm, noise = float(source.norm()), float(difference.norm())
    assert (error.amax, error.max_abs) == (weight.abs().max(), difference.abs().max())
    assert math.isclose(error.norm, norm, rel_tol=1e-6, abs_tol=1e-37)
    assert math.isclose(error.relative, noise / norm if norm else 0.0, rel_tol=1e-5, abs_tol=1e-9)
    assert math.isclose(error.zeros, float((found.data.float() == 0).double().mean()), rel_tol=1e-9)
    assert math.isclose(error.saturated, float((found.data.float().abs() == 448).double().mean()), rel_tol=1e-9)
    assert (error.scale_min, error.scale_max) == (found.scale.min(), found.scale.max())


def test_one_scale_of_a_group():
    torch.manual_seed(0)
    weight = torch.randn(130, 200)
    amax = torch.tensor(9.0)
    found, _ = strips.quantize(weight, SCHEMES["tensor"], "w", amax)
    assert found.scale == amax / 448
    assert torch.equal(found.data.view(torch.uint8), (weight / found.scale).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("amax", [1e-44, 2**-133, 2**-126, 3e38])
def test_the_ends_of_float32(kind, amax):
    """Scales that would be zero, subnormal weights, and the largest ones, whose squares no float32 holds."""
    weight = torch.linspace(-1, 1, 260 * 130).reshape(260, 130) * amax
    found, error = strips.quantize(weight, SCHEMES[kind], "w")
    assert same(found, *REFERENCES[kind](weight))
    assert math.isfinite(error.norm)
    assert math.isfinite(error.relative)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCHEMES)
def test_values_that_are_not_finite_stop_the_run_by_name(kind, dtype, value):
    weight = torch.randn(200, 160).to(dtype)
    weight[150, 7] = value
    with pytest.raises(CheckpointError, match=r"decoder\.x \[200, 160\] has 1 values .* first at \[150, 7\]"):
        strips.quantize(weight, SCHEMES[kind], "decoder.x")


@pytest.mark.parametrize("kind", REFERENCES)
def test_all_zero_weight_has_scale_one(kind):
    found, error = strips.quantize(torch.zeros(130, 200), SCHEMES[kind], "w")
    assert (found.scale == 1).all()
    assert (found.amax == 448).all()
    assert (found.data.float() == 0).all()
    assert (error.relative, error.sqnr_db, error.norm, error.zeros) == (0.0, None, 0.0, 1.0)


def test_every_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(decode(codes, torch.empty(254), torch.empty(254, dtype=torch.int16)), codes.float())
