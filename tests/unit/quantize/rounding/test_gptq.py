"""GPTQ against the classic form, which inverts the second moment and rounds one column after the other."""

import numpy as np
import pytest
import torch

from mptq.errors import CheckpointError
from mptq.quantize import quantizer
from mptq.quantize.rounding import gptq, kernels
from mptq.recipes.schemes import SCHEMES
from tests.unit.quantize.rounding.conftest import correlated, e4m3, element_scale, loss

KINDS = ("block", "row", "tensor", "mx")


def classic(weight, moment, scale):
    """Frantar et al., algorithm 1 with blocks of one column, in the order of descending diagonal."""
    order = moment.diagonal().argsort(descending=True, stable=True)
    left, scale = weight.double()[:, order], scale.double()[:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(moment.double()[order][:, order]), upper=True)
    found = torch.zeros_like(left)
    for column in range(left.shape[1]):
        found[:, column] = e4m3(left[:, column], scale[:, column])
        error = (left[:, column] - found[:, column]) / inverse[column, column]
        left[:, column:] -= error[:, None] * inverse[column, column:]
    result = torch.empty_like(found)
    result[:, order] = found
    return result


def descended(weight, moment, scale, rounded):
    """Each column at its best value given all others, in order."""
    weight, moment, scale, rounded = (part.double().clone() for part in (weight, moment, scale, rounded))
    for column in range(weight.shape[1]):
        step = (weight - rounded) @ moment[:, column] / moment[column, column]
        rounded[:, column] = e4m3(rounded[:, column] + step, scale[:, column])
    return rounded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(48, 96), (40, 288), (3, 128)])
def test_codes_are_those_of_the_classic_form_and_one_descent(rows, columns, kind):
    inputs, weight = correlated(2000, columns), torch.randn(rows, columns) / 8
    moment = gptq.damped(inputs.T @ inputs, 0.1)
    scale = element_scale(weight, SCHEMES[kind])
    found = gptq.solve(weight, gptq.factored(moment, "w"), scale)
    expected = descended(weight, moment, scale, classic(weight, moment, scale))
    codes, wanted = ((part / scale).to(torch.float8_e4m3fn).float() for part in (found, expected.float()))
    # Sums in float32 decide a few ties otherwise than those in float64, and what follows from them.
    assert (codes == wanted).float().mean() > 0.99
    assert loss(weight, found, moment) == pytest.approx(loss(weight, expected, moment), rel=1e-3)
    assert loss(weight, found, moment) < 0.75 * loss(weight, e4m3(weight, scale), moment)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_rounded_to_the_same_codes(kind):
    """ModelOpt's quantizer gets numbers that are E4M3 times the scale, and finds the codes."""
    inputs, weight = correlated(500, 160), torch.randn(200, 160) / 8
    scheme, scale = SCHEMES[kind], element_scale(weight, SCHEMES[kind])
    found = gptq.solve(weight, gptq.factored(gptq.damped(inputs.T @ inputs, 0.1), "w"), scale)
    nearest, _ = quantizer.quantize(weight, scheme, "w")
    amax = torch.exp2(nearest.scale.float() - 127) * 448 if scheme.exponents else nearest.amax
    made, error = quantizer.quantize(found, scheme, "w", amax)
    assert torch.equal(made.scale, nearest.scale)
    assert torch.equal(made.data.float() * scale, found)
    assert error.relative == 0


def test_independent_inputs_are_rounded_to_nearest():
    weight = torch.randn(30, 200)
    scale = element_scale(weight, SCHEMES["block"])
    moment = torch.diag(torch.rand(200) + 0.5)
    assert torch.equal(gptq.solve(weight, gptq.factored(moment, "w"), scale), e4m3(weight, scale))


def test_inputs_that_are_zero_are_rounded_to_nearest_and_change_nothing_else():
    inputs, weight = correlated(500, 160), torch.randn(20, 160) / 8
    dead = torch.zeros(160, dtype=torch.bool)
    dead[[0, 7, 159]] = True
    scale = element_scale(weight, SCHEMES["row"])
    moment = gptq.damped(inputs[:, ~dead].T @ inputs[:, ~dead], 0.0)
    alive = gptq.solve(weight[:, ~dead], gptq.factored(moment, "w"), scale[:, ~dead])
    inputs[:, dead] = 0
    moment = gptq.damped(inputs.T @ inputs, 0.0)
    assert torch.equal(moment[dead], torch.eye(160)[dead])
    found = gptq.solve(weight, gptq.factored(moment, "w"), scale)
    assert torch.equal(found[:, dead], e4m3(weight, scale)[:, dead])
    assert (found[:, ~dead] == alive).float().mean() > 0.99


def test_a_moment_that_cannot_be_factored_is_an_error_with_the_name():
    with pytest.raises(CheckpointError, match="^a weight: the second moment of its inputs is not positive definite"):
        gptq.factored(-torch.eye(3), "a weight")


def test_the_factor_is_unit_upper_triangular():
    moment = gptq.damped(correlated(500, 96).T @ correlated(500, 96), 0.1)
    curvature = gptq.factored(moment, "w")
    moment, unit = moment[curvature.order][:, curvature.order], curvature.follows.double()
    assert torch.equal(unit, unit.triu())
    assert torch.allclose(unit.diagonal(), torch.ones(96).double())
    inner = torch.linalg.inv(unit) @ moment.double() @ torch.linalg.inv(unit).T
    assert float((inner - torch.diag(inner.diagonal())).abs().max()) < 1e-3 * float(inner.diagonal().min())


def test_products_with_the_inverse():
    inputs, products = correlated(500, 96), torch.randn(7, 96)
    inputs[:, 3] = 0
    products[:, 3] = 0
    moment = gptq.damped(inputs.T @ inputs, 0.1)
    found = gptq.factored(moment, "w").solve(products)
    assert torch.allclose(found.double(), products.double() @ torch.linalg.inv(moment.double()), rtol=1e-3, atol=1e-7)
    assert (found[:, 3] == 0).all()


def test_the_order_of_the_inputs_does_not_matter():
    inputs, weight = correlated(500, 96), torch.randn(20, 96) / 8
    scale, order = element_scale(weight, SCHEMES["row"]), torch.randperm(96)
    moment = gptq.damped(inputs.T @ inputs, 0.1)
    found = gptq.solve(weight, gptq.factored(moment, "w"), scale)
    mixed = gptq.solve(weight[:, order], gptq.factored(moment[order][:, order], "w"), scale[:, order])
    assert abs(loss(weight, found, moment) / loss(weight[:, order], mixed, moment[order][:, order]) - 1) < 0.02


def test_torchs_operators_do_as_the_compiled_loops():
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    scale = element_scale(weight, SCHEMES["row"])
    curvature = gptq.damped(correlated(300, 64).T @ correlated(300, 64), 0.1)
    follows = gptq.factored(curvature, "w").follows
    one, two = weight.clone(), weight.clone()
    error = torch.empty_like(weight)
    kernels.feed_forward(one.numpy(), follows.numpy(), scale.numpy(), weight.numpy(), error.numpy())
    other = gptq.feed_forward_by_torch(two, follows, scale, weight)
    assert (error == other).float().mean() > 0.99
    rounded = weight - error
    gradient = error @ curvature
    again, by_torch = rounded.clone(), rounded.clone()
    kernels.descend(gradient.clone().numpy(), curvature.numpy(), scale.numpy(), again.numpy())
    gptq.descend_by_torch(gradient.clone(), curvature, scale, by_torch)
    assert (again == by_torch).float().mean() > 0.99
    assert loss(weight, again, curvature) <= loss(weight, rounded, curvature)


def test_each_number_is_rounded_as_torch_does():
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = torch.cat([numbers[numbers.isfinite()], torch.arange(-2000, 2000) / 2**11])  # ties of subnormal numbers too
    for scale in (1.0, 0.37, 2.0**-39):
        values = numbers * scale
        found = torch.tensor([kernels._nearest(np.float32(value), np.float32(scale)) for value in values.numpy()])
        assert torch.equal(found, e4m3(values, torch.tensor(scale)))
