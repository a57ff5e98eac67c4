"""The search for scales against every candidate tried by hand."""

import pytest
import torch

from mptq.quantize import quantizer
from mptq.quantize.fp8 import element_scales
from mptq.quantize.rounding import kernels
from mptq.quantize.rounding.scales import cells, errors_by_torch, search
from mptq.recipes.algorithms import SEARCHED
from mptq.recipes.schemes import SCHEMES
from tests.unit.quantize.rounding.conftest import e4m3


def cases(weight, scheme):
    """Row and column ranges of each cell, in the order of the scales."""
    height, width = cells(scheme, tuple(weight.shape))
    for top in range(0, weight.shape[0], height):
        for left in range(0, weight.shape[1], width):
            yield slice(top, top + height), slice(left, left + width)


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 5), (2000, 700)])
def test_the_best_of_all_candidates_is_found(kind, shape):
    torch.manual_seed(0)
    scheme, weight = SCHEMES[kind], torch.randn(shape) * torch.exp2(torch.randint(-6, 6, (shape[0], 1)).float())
    diagonal = torch.rand(shape[1]) * torch.exp2(torch.randint(-4, 4, (shape[1],)).float())
    made, _ = quantizer.quantize(weight, scheme, "w")
    found = search([weight], diagonal, scheme, made.amax)
    assert found.shape == made.amax.shape
    for (rows, columns), largest, best in zip(cases(weight, scheme), made.amax.flatten(), found.flatten(), strict=True):
        part = weight[rows, columns].double()
        errors = {}
        for factor in SEARCHED:
            scale = (largest * factor) / 448
            error = (e4m3(weight[rows, columns], scale).double() - part).square() * diagonal[columns]
            errors[float(largest * factor)] = float(error.sum())
        assert errors[float(best)] <= min(errors.values()) * (1 + 1e-4)


def test_a_group_has_the_scale_that_is_best_for_all():
    torch.manual_seed(0)
    parts, diagonal = [torch.randn(40, 64), torch.randn(300, 64) * 3], torch.rand(64)
    whole, scheme = torch.cat(parts), SCHEMES["tensor"]
    assert torch.equal(search(parts, diagonal, scheme, whole.abs().max()), search([whole], diagonal, scheme, whole.abs().max()))


def test_cells_of_zeros_have_scale_1():
    weight = torch.zeros(256, 128)
    weight[128:] = torch.randn(128, 128)
    made, _ = quantizer.quantize(weight, SCHEMES["block"], "w")
    found = search([weight], torch.ones(128), SCHEMES["block"], made.amax)
    assert found[0, 0] == 448


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_torchs_operators_do_as_the_compiled_loops(kind):
    torch.manual_seed(0)
    scheme, weight, diagonal = SCHEMES[kind], torch.randn(200, 300), torch.rand(300)
    made, _ = quantizer.quantize(weight, scheme, "w")
    (height, width), found = cells(scheme, (200, 300)), []
    scales = torch.stack([made.scale * factor for factor in (0.5, 1.0, 3.0)])
    scales = scales.reshape(3, -(-200 // height), -(-300 // width))
    found = torch.zeros(scales.shape, dtype=torch.float64)
    kernels.scale_errors(weight.numpy(), diagonal.numpy(), scales.numpy(), height, width, found.numpy())
    assert torch.allclose(found, errors_by_torch(weight, diagonal, scales, (height, width)), rtol=1e-5)


def test_each_element_has_the_scale_of_its_cell():
    weight = torch.randn(130, 200)
    for kind in ("block", "row", "tensor"):
        scheme = SCHEMES[kind]
        made, _ = quantizer.quantize(weight, scheme, "w")
        whole = element_scales(made, scheme)
        for (rows, columns), scale in zip(cases(weight, scheme), made.scale.flatten(), strict=True):
            assert (whole[rows, columns] == scale).all()
