import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptq.quantize import fp8
from mptq.recipe import load_recipe
from mptq.types import Fp8Weight
from tests import reference


def make(rows, columns, block, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.exp2(torch.randint(-9, 9, (rows, 1)).float())
    data, scale = reference.block(weight) if block else reference.tensor(weight)
    return weight, Fp8Weight(data.view(torch.float8_e4m3fn), scale)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([128, None]))
def test_dequantize_is_data_times_scale(rows, columns, block):
    _, found = make(rows, columns, block)
    for i, j in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        scale = found.scale if block is None else found.scale[i // 128, j // 128]
        assert fp8.dequantize(found, block)[i, j] == found.data[i, j].float() * scale


@pytest.mark.parametrize("block", [128, None])
def test_error_is_measured_over_all_strips(block):
    weight, found = make(700, 90, block)
    whole = fp8.dequantize(found, block)
    error = fp8.weight_error(weight, found, block)
    assert error.amax == weight.abs().max()
    assert error.max_abs == (whole - weight).abs().max()
    assert math.isclose(error.norm, float(weight.norm()), rel_tol=1e-5)
    assert math.isclose(error.relative, float((whole - weight).norm() / weight.norm()), rel_tol=1e-5)
    assert math.isclose(error.sqnr_db, -20 * math.log10(error.relative), rel_tol=1e-9)


def test_error_of_an_exact_weight():
    found = Fp8Weight(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.tensor(1.0))
    error = fp8.weight_error(torch.ones(4, 4), found, None)
    assert (error.relative, error.sqnr_db, error.norm) == (0.0, None, 4.0)
    zero = Fp8Weight(torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.tensor(1.0))
    assert fp8.weight_error(torch.zeros(4, 4), zero, None).relative == 0.0


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([128, None]), st.integers(0, 99))
def test_reference_scale_and_bound_accept_right_weights(rows, columns, block, seed):
    weight, found = make(rows, columns, block, seed)
    recipe = load_recipe("fp8-blockwise" if block else "fp8-per-tensor")
    assert torch.equal(fp8.reference_scale(weight, recipe), found.scale)
    assert torch.equal(fp8.reference_scale(weight, load_recipe("fp8-per-channel")), reference.row(weight)[1])
    assert fp8.first_out_of_bound(weight, found, block) is None


@given(st.integers(0, 199), st.integers(0, 149), st.sampled_from([128, None]), st.sampled_from([1, -1]))
def test_bound_sees_one_step_of_e4m3(row, column, block, step):
    weight, found = make(200, 150, block)
    code = int(found.data.view(torch.uint8)[row, column])
    if (code & 0x7F) in (0, 0x7E) or (code + step) & 0x7F == 0x7F:
        return  # the ends of the range have no neighbour on one side
    found.data.view(torch.uint8)[row, column] = code + step
    neighbour = fp8.dequantize(found, block)[row, column]
    original = weight[row, column]
    halfway = abs(neighbour - original) <= max(abs(original) / 16, 0) * (1 + 2**-20)
    if not halfway:
        assert fp8.first_out_of_bound(weight, found, block) == (row, column)


def test_bound_sees_nan():
    weight, found = make(10, 10, None)
    found.data.view(torch.uint8)[3, 4] = 0x7F
    assert fp8.first_out_of_bound(weight, found, None) == (3, 4)
