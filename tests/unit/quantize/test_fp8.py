import torch
from hypothesis import given
from hypothesis import strategies as st

from mptq.quantize import fp8, quantizer
from mptq.recipes.schemes import SCHEMES
from mptq.types import Fp8Weight
from tests.support import reference

BLOCK, ROW, TENSOR, MX = (SCHEMES[scale] for scale in ("block", "row", "tensor", "mx"))
MAKE = {"block": reference.block, "row": reference.row, "tensor": reference.tensor}


def make(rows, columns, scheme, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.exp2(torch.randint(-9, 9, (rows, 1)).float())
    if scheme is MX:
        return weight, quantizer.quantize(weight, MX, "w")[0]  # tests/unit/quantize/test_mx.py
    data, scale = MAKE[scheme.scale](weight)
    return weight, Fp8Weight(data.view(torch.float8_e4m3fn), scale)


schemes = st.sampled_from([BLOCK, ROW, TENSOR, MX])


@given(st.integers(1, 300), st.integers(1, 9), schemes)
def test_dequantize_is_data_times_scale(rows, columns, scheme):
    columns *= 32
    _, found = make(rows, columns, scheme)
    for i, j in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        places = {"block": (i // 128, j // 128), "row": (i, 0), "tensor": (), "mx": (i, j // 32)}
        scale = found.scale[places[scheme.scale]]
        scale = 2.0 ** (int(scale) - 127) if scheme is MX else scale
        assert fp8.dequantize(found, scheme)[i, j] == found.data[i, j].float() * scale
    rounded = fp8.dequantize(found, scheme, torch.empty(rows, columns, dtype=torch.bfloat16))
    assert torch.equal(rounded, fp8.dequantize(found, scheme).bfloat16())


@given(st.integers(1, 300))
def test_a_shared_scale_may_be_repeated_for_every_row(rows):
    _, found = make(rows, 32, TENSOR)
    repeated = Fp8Weight(found.data, found.scale.expand(rows, 1))
    assert torch.equal(fp8.dequantize(repeated, TENSOR), fp8.dequantize(found, TENSOR))


@given(st.integers(1, 300), st.integers(1, 9), schemes, st.integers(0, 99))
def test_reference_scale_and_bound_accept_right_weights(rows, columns, scheme, seed):
    weight, found = make(rows, columns * 32, scheme, seed)
    assert torch.equal(fp8.reference_scale(weight, scheme), found.scale)
    assert fp8.first_out_of_bound(weight, found, scheme) is None


@given(st.integers(0, 199), st.integers(0, 159), schemes, st.sampled_from([1, -1]))
def test_bound_sees_one_step_of_e4m3(row, column, scheme, step):
    weight, found = make(200, 160, scheme)
    code = int(found.data.view(torch.uint8)[row, column])
    if (code & 0x7F) in (0, 0x7E) or (code + step) & 0x7F == 0x7F:
        return  # the ends of the range have no neighbor on one side
    found.data.view(torch.uint8)[row, column] = code + step
    neighbor = fp8.dequantize(found, scheme)[row, column]
    original = weight[row, column]
    halfway = abs(neighbor - original) <= max(abs(original) / 16, 0) * (1 + 2**-20)
    if not halfway:
        assert fp8.first_out_of_bound(weight, found, scheme) == (row, column)


def test_bound_sees_nan():
    weight, found = make(10, 10, TENSOR)
    found.data.view(torch.uint8)[3, 4] = 0x7F
    assert fp8.first_out_of_bound(weight, found, TENSOR) == (3, 4)
