"""Quantization in strips: bit for bit the same as ModelOpt and the reference, with the right error statistics."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.errors import CheckpointError
from mptq.quantize import cpu_kernels, quantizer, torch_kernels
from mptq.quantize.fp8 import dequantize, first_out_of_bound, powers_of_two, reference_scale
from mptq.recipes.schemes import SCHEMES
from tests.support import reference
from tests.unit.quantize.test_modelopt import weights

SCHEMES = {scale: SCHEMES[scale] for scale in ("block", "row", "tensor", "mx")}
REFERENCES = {"block": reference.block, "row": reference.row, "tensor": reference.tensor}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, params=["compiled", "compiled, small strips", "operators"])
def _strips(request, monkeypatch):
    """The CPU kernels, with strips of the real size and with small ones (several per matrix), and the GPU kernels."""
    if "small" in request.param:
        monkeypatch.setitem(quantizer._STRIP, "cpu", 1 << 14)
    if request.param == "operators":
        monkeypatch.setattr(quantizer, "_arithmetic", lambda _device: torch_kernels)


def same(found, data, scale):
    return torch.equal(found.data.view(torch.uint8), data.view(torch.uint8)) and torch.equal(found.scale, scale)


@settings(max_examples=60)
@given(weights(), st.sampled_from(list(REFERENCES)), DTYPES)
def test_equals_the_reference(weight, kind, dtype):
    weight = weight.clamp(-60000, 60000).to(dtype)
    found, _ = quantizer.quantize(weight, SCHEMES[kind], "w")
    assert same(found, *REFERENCES[kind](weight.float()))


@settings(max_examples=15)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 99), DTYPES)
def test_microscaling_equals_the_reference(rows, blocks, seed, dtype):
    torch.manual_seed(seed)
    weight = (torch.randn(rows, blocks * 32) * torch.exp2(torch.randint(-9, 9, (rows, 1)).float())).to(dtype)
    weight = weight[: -(-4096 // weight.shape[1])]  # the reference goes element by element
    assert same(quantizer.quantize(weight, SCHEMES["mx"], "w")[0], *reference.mx(weight.float()))


@settings(max_examples=30)
@given(weights(), st.sampled_from(list(REFERENCES)))
def test_error_equals_that_of_the_whole_matrix_in_float64(weight, kind):
    found, error = quantizer.quantize(weight, SCHEMES[kind], "w")
    whole, source = dequantize(found, SCHEMES[kind]).double(), weight.double()
    difference = (whole.float() - weight).double()
    norm, noise = float(source.norm()), float(difference.norm())
    assert (error.amax, error.max_abs) == (weight.abs().max(), difference.abs().max())
    assert math.isclose(error.norm, norm, rel_tol=1e-6, abs_tol=1e-37)
    assert math.isclose(error.relative, noise / norm if norm else 0.0, rel_tol=1e-5, abs_tol=1e-9)
    assert math.isclose(error.zeros, float((found.data.float() == 0).double().mean()), rel_tol=1e-9)
    assert math.isclose(error.saturated, float((found.data.float().abs() == 448).double().mean()), rel_tol=1e-9)
    assert (error.scale_min, error.scale_max) == (found.scale.min(), found.scale.max())


@pytest.mark.parametrize("kind", REFERENCES)
def test_scales_of_given_magnitudes(kind):
    torch.manual_seed(0)
    weight = torch.randn(130, 200)
    amax = torch.rand(SCHEMES[kind].grid(130, 200)) * 5
    found, _ = quantizer.quantize(weight, SCHEMES[kind], "w", amax)
    assert torch.equal(found.scale, amax / 448)
    side = 128 if kind == "block" else 1
    scale = (
        found.scale.expand(-(-130 // side), -(-200 // side)).repeat_interleave(side, 0).repeat_interleave(side, 1)[:130, :200]
    )
    wanted = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found.data.view(torch.uint8), wanted.view(torch.uint8))


@settings(max_examples=60)
@given(weights(), st.integers(-130, -10), st.sampled_from(list(SCHEMES)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_tiny_weights_have_scales_that_kernels_can_divide_by(weight, exponent, kind, dtype):
    """Bit for bit the reference, with the scale floor (fp8.SCALE_FLOOR): no error beyond 2^-49 and E4M3 rounding."""
    weight = weight[: 64 if kind == "mx" else 400, : 32 * -(-weight.shape[1] // 32)]
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).mul(2.0**exponent).to(dtype)
    found, error = quantizer.quantize(weight, SCHEMES[kind], "w")
    if kind == "mx" and weight.numel() > 4096:  # the reference goes element by element
        weight = weight[: 4096 // weight.shape[1] or 1]
        found, error = quantizer.quantize(weight, SCHEMES[kind], "w")
    assert same(found, *(reference.mx if kind == "mx" else REFERENCES[kind])(weight.float()))
    scale = powers_of_two(found.scale) if kind == "mx" else found.scale
    assert error.scale_min == float(scale.min()) >= 2.0**-39
    for kernels_see in (scale, 1 / scale, scale * scale, scale.min() / scale.max(), scale * 2.0**-9, scale.bfloat16().float()):
        assert (kernels_see >= torch.finfo(torch.float32).tiny).all()
        assert kernels_see.isfinite().all()
    values, whole = weight.double(), dequantize(found, SCHEMES[kind]).double()
    if float(weight.abs().max()) < 448 * 2.0**-39:
        assert ((whole - values).abs() <= torch.maximum(values.abs() * 2.0**-4, torch.tensor(2.0**-49)) * (1 + 2**-20)).all()
    assert first_out_of_bound(weight, found, SCHEMES[kind]) is None
    assert torch.equal(reference_scale(weight, SCHEMES[kind]), found.scale)


@pytest.mark.parametrize("kind", SCHEMES)
def test_the_floor_of_scales(kind):
    """An amax of 448 * 2^-39 has the scale 2^-39, the next larger its own scale, and all smaller ones 2^-39 too."""
    least, floor = torch.tensor(448 * 2.0**-39), 2.0**-39
    above, below = (torch.nextafter(least, torch.tensor(other)) for other in (1.0, 0.0))
    for amax, scale in ((least, floor), (above, 2 * floor if kind == "mx" else float(above / 448)), (below, floor)):
        found, _ = quantizer.quantize(amax.expand(128, 128).contiguous(), SCHEMES[kind], "w")
        assert ((powers_of_two(found.scale) if kind == "mx" else found.scale) == scale).all()
    found, _ = quantizer.quantize(torch.full((128, 128), 2.0**-149), SCHEMES[kind], "w")
    assert ((powers_of_two(found.scale) if kind == "mx" else found.scale) == floor).all()
    assert (found.data.float() == 0).all()


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("amax", [1e-44, 2**-133, 2**-126, 3e38])
def test_the_ends_of_float32(kind, amax):
    """Scales that would be zero, subnormal weights, and the largest ones, whose squares overflow float32."""
    weight = torch.linspace(-1, 1, 260 * 130).reshape(260, 130) * amax
    found, error = quantizer.quantize(weight, SCHEMES[kind], "w")
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
        quantizer.quantize(weight, SCHEMES[kind], "decoder.x")


@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 0), (300, 70), (3, 4, 5)])
def test_values_that_are_not_finite_are_found_in_any_shape(shape):
    tensor = torch.randn(shape)
    assert quantizer.amax_of(tensor, "w") == (tensor.abs().max() if tensor.numel() else 0)
    quantizer.require_finite(tensor, "w")
    if tensor.numel():
        tensor.view(-1)[-1] = math.nan
        last = [size - 1 for size in shape]
        with pytest.raises(
            CheckpointError, match=re.escape(f"w {list(shape)} has 1 values that are NaN or infinite, the first at {last}")
        ):
            quantizer.require_finite(tensor, "w")


@pytest.mark.parametrize("kind", REFERENCES)
def test_all_zero_weight_has_scale_one(kind):
    found, error = quantizer.quantize(torch.zeros(130, 200), SCHEMES[kind], "w")
    assert (found.scale == 1).all()
    assert (found.amax == 448).all()
    assert (found.data.float() == 0).all()
    assert (error.relative, error.sqnr_db, error.norm, error.zeros) == (0.0, None, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_is_rounded_as_torch_does(dtype):
    """All 65,536 bfloat16 values, and the float32 values around every midpoint between two E4M3 values."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if dtype is torch.float32:
        bits = torch.arange(0x3A000000, 0x43E80001, 0x80000, dtype=torch.int32)  # in steps of half an E4M3 unit
        numbers = torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)
        numbers = torch.cat([numbers, -numbers])
    numbers = numbers[numbers.abs() <= 464].reshape(1, -1)
    found = torch.empty(numbers.shape, dtype=torch.float8_e4m3fn)
    cpu_kernels.cast(numbers, torch.ones(1, 1), (1, numbers.numel()), found)
    assert torch.equal(found.view(torch.uint8), numbers.float().to(torch.float8_e4m3fn).view(torch.uint8))


@settings(max_examples=60)
@given(weights(), st.integers(1, 200), st.integers(1, 700), DTYPES)
def test_compiled_kernels_equal_torch_kernels_for_any_cells(weight, height, width, dtype):
    weight = weight.clamp(-60000, 60000).to(dtype)
    amax = torch_kernels.magnitudes(weight, height, width)
    assert torch.equal(cpu_kernels.magnitudes(weight, height, width), amax)
    made = [torch.empty(weight.shape, dtype=torch.float8_e4m3fn) for _ in range(2)]
    scale = torch.where(amax == 0, 1.0, amax / 448).clamp_min(2**-126)
    one, other = (
        module.cast(weight, scale, (height, width), out) for module, out in zip((cpu_kernels, torch_kernels), made, strict=True)
    )
    assert torch.equal(made[0].view(torch.uint8), made[1].view(torch.uint8))
    assert (one.worst, one.zeros, one.saturated) == (other.worst, other.zeros, other.saturated)
    assert math.isclose(one.noise, other.noise, rel_tol=1e-12)
    assert math.isclose(one.signal, other.signal, rel_tol=1e-12)


def test_without_a_writable_cache_kernels_are_compiled_again(monkeypatch):
    import numba

    def nowhere(*_args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(cpu_kernels, "njit", nowhere)
    assert cpu_kernels._compiled()(lambda number: number + 1)(1) == 2
