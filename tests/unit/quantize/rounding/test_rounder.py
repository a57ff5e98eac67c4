"""A method's result is used where withheld inputs show that it is better, and rounding to nearest elsewhere."""

from itertools import product

import pytest
import torch

from mptq.calibration.moments import moments, withheld
from mptq.distributed import Ranks
from mptq.quantize import quantizer
from mptq.quantize.fp8 import dequantize
from mptq.quantize.rounding.moments import Moments
from mptq.quantize.rounding.rounder import Rounder, Shared
from mptq.recipes.schemes import SCHEMES
from tests.unit.quantize.rounding.conftest import correlated

CPU = torch.device("cpu")


def of(inputs, batches=8):
    """Moments of inputs in batches."""
    rows = dict(enumerate(inputs.chunk(batches)))
    return moments(rows, len(rows), inputs.shape[1], CPU, Ranks())


@pytest.mark.parametrize(("kind", "method"), [*product(("block", "row"), ("scales", "gptq")), ("mx", "gptq")])
def test_the_outputs_of_withheld_inputs_are_nearer(kind, method):
    inputs, weight, scheme = correlated(4000, 192), torch.randn(256, 192).bfloat16() / 8, SCHEMES[kind]
    found = Rounder(of(inputs), method).round(weight, scheme, "w")
    nearest, _ = quantizer.quantize(weight, scheme, "w")
    held = torch.cat([part for number, part in enumerate(inputs.chunk(8)) if withheld(number, 8)]).double()
    outputs = held @ weight.double().T
    for error, made in ((found.error, found.weight), (found.nearest, dequantize(nearest, scheme))):
        assert error == pytest.approx(float((held @ made.double().T - outputs).norm() / outputs.norm()), rel=1e-3)
    if method == "gptq":
        assert found.method == "gptq"
        assert found.error < 0.8 * found.nearest
    assert found.error <= found.nearest
    # What ModelOpt's quantizer makes of it has these values.
    made, _ = quantizer.quantize(found.weight, scheme, "w", found.amax)
    assert torch.equal(dequantize(made, scheme), found.weight)


@pytest.mark.parametrize("kind", ["block", "row", "tensor", "mx"])
def test_nearest_is_kept_where_the_method_is_not_better(kind):
    """The inputs that were withheld are unlike those that the codes were fitted to."""
    inputs, other = correlated(3500, 96), correlated(500, 96, seed=1)[:, torch.arange(95, -1, -1)]
    weight, scheme = torch.randn(128, 96), SCHEMES[kind]
    fitted = inputs.T @ inputs
    turned = torch.linalg.qr(torch.randn(96, 96))[0]
    strange = torch.linalg.eigh(fitted)
    least = strange.eigenvectors[:, :20]  # directions that the inputs hardly had, in which GPTQ leaves its errors
    held = least @ turned[:20, :20] @ turned[:20, :20].T @ least.T * 1000 + other.T @ other * 1e-6
    found = Rounder(Moments(fitted, 3500, held), "gptq").round(weight, scheme, "w")
    nearest, _ = quantizer.quantize(weight, scheme, "w")
    assert found.method == "nearest"
    assert found.error == found.nearest
    assert torch.equal(found.weight, dequantize(nearest, scheme))


def test_few_tokens_only_choose_the_scales():
    assert Rounder(of(correlated(64, 96)), "gptq").method == "scales"
    found = Rounder(of(correlated(80, 96)), "gptq").round(torch.randn(128, 96), SCHEMES["row"], "w")
    assert found.method in ("scales", "nearest")


def test_no_tokens_leave_nearest_and_measure_nothing():
    weight = torch.randn(128, 96)
    rounder = Rounder(moments({}, 4, 96, CPU, Ranks()), "gptq")
    found = rounder.round(weight, SCHEMES["row"], "w")
    nearest, _ = quantizer.quantize(weight, SCHEMES["row"], "w")
    assert torch.equal(found.weight, dequantize(nearest, SCHEMES["row"]))
    assert (found.method, found.error, found.nearest) == ("nearest", None, None)
    amax = torch.tensor(3.0)
    assert rounder.shared_amax([weight], SCHEMES["tensor"], amax) is amax


def test_inputs_none_of_which_were_withheld_show_nothing():
    """As of an expert that only some batches are routed to."""
    inputs, weight = correlated(3000, 96), torch.randn(128, 96)
    found = Rounder(Moments(inputs.T @ inputs, 3000, torch.zeros(96, 96)), "gptq").round(weight, SCHEMES["row"], "w")
    assert (found.method, found.error, found.nearest) == ("nearest", None, None)
    alone = Rounder(Moments(inputs.T @ inputs, 3000, None), "gptq").round(weight, SCHEMES["row"], "w")
    assert alone.method == "gptq"
    assert alone.error < alone.nearest


def test_a_group_with_one_scale():
    inputs, weights, scheme = correlated(4000, 96), [torch.randn(64, 96), torch.randn(32, 96) * 2], SCHEMES["tensor"]
    rounder, largest = Rounder(of(inputs), "gptq"), torch.stack([weight.abs().max() for weight in weights]).max()
    shared = Shared(largest, rounder.shared_amax(weights, scheme, largest))
    found = [rounder.round(weight, scheme, "w", shared) for weight in weights]
    assert {float(one.amax) for one in found} == {float(shared.best)}
    assert all(one.error < one.nearest for one in found)
