"""A method's result is used where withheld inputs show that it is better, and rounding to nearest elsewhere."""

from itertools import product

import pytest
import torch

from mptq.calibration.linear_inputs import Inputs
from mptq.calibration.moments import Batches, moments, withheld
from mptq.distributed import Ranks
from mptq.quantize import quantizer
from mptq.quantize.fp8 import dequantize
from mptq.quantize.rounding.moments import Moments, Sample
from mptq.quantize.rounding.rounder import Rounder, Shared
from mptq.recipes.schemes import SCHEMES
from tests.unit.quantize.rounding.conftest import correlated

CPU = torch.device("cpu")


def of(inputs, batches=8):
    """Moments of inputs in batches."""
    rows = {number: Inputs(part) for number, part in enumerate(inputs.chunk(batches))}
    return moments(Batches(len(rows), inputs.shape[1], rows), CPU, Ranks())


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
    inputs = correlated(3500, 96)
    weight, scheme = torch.randn(128, 96), SCHEMES[kind]
    fitted = inputs.T @ inputs
    least = torch.linalg.eigh(fitted).eigenvectors[
        :, :20
    ]  # directions that the inputs hardly had: GPTQ leaves its errors there
    held = torch.randn(500, 20) @ least.T
    found = Rounder(Moments(fitted, 3500, Sample(held)), "gptq").round(weight, scheme, "w")
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
    rounder = Rounder(moments(Batches(4, 96, {}), CPU, Ranks()), "gptq")
    found = rounder.round(weight, SCHEMES["row"], "w")
    nearest, _ = quantizer.quantize(weight, SCHEMES["row"], "w")
    assert torch.equal(found.weight, dequantize(nearest, SCHEMES["row"]))
    assert (found.method, found.error, found.nearest) == ("nearest", None, None)
    amax = torch.tensor(3.0)
    assert rounder.shared_amax([weight], SCHEMES["tensor"], amax) is amax


def test_inputs_none_of_which_were_withheld_show_nothing():
    """As of an expert that only some batches are routed to."""
    inputs, weight = correlated(3000, 96), torch.randn(128, 96)
    none = Sample(torch.zeros(0, 96))
    found = Rounder(Moments(inputs.T @ inputs, 3000, none), "gptq").round(weight, SCHEMES["row"], "w")
    assert (found.method, found.error, found.nearest) == ("nearest", None, None)
    alone = Rounder(of(inputs, 1), "gptq").round(weight, SCHEMES["row"], "w")
    assert alone.method == "gptq"
    assert alone.error < alone.nearest


def test_a_group_with_one_scale():
    inputs, weights, scheme = correlated(4000, 96), [torch.randn(64, 96), torch.randn(32, 96) * 2], SCHEMES["tensor"]
    rounder, largest = Rounder(of(inputs), "gptq"), torch.stack([weight.abs().max() for weight in weights]).max()
    shared = Shared(largest, rounder.shared_amax(weights, scheme, largest))
    found = [rounder.round(weight, scheme, "w", shared) for weight in weights]
    assert {float(one.amax) for one in found} == {float(shared.best)}
    assert all(one.error < one.nearest for one in found)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", ["block", "row", "mx"])
def test_codes_make_up_for_what_earlier_linears_have_done(kind, added):
    """The outputs, and the residual stream that they are added to, are nearer to those of the reference."""
    rows, weight, scheme = correlated(4000, 96), torch.randn(128, 96) / 8, SCHEMES[kind]
    reference = rows + 0.05 * rows @ torch.randn(96, 96) / 8
    streams = [torch.randn(4000, 128), torch.randn(4000, 128)] if added else [None, None]
    if added:
        streams[1] = streams[0] + 0.02 * rows @ torch.randn(96, 128)
    weights = torch.rand(4000, 1) + 0.5 if added else None
    parts = torch.arange(4000).chunk(8)
    mine, theirs = (
        {
            number: Inputs(x[part], None if weights is None else weights[part], None if h is None else h[part])
            for number, part in enumerate(parts)
        }
        for x, h in ((rows, streams[0]), (reference, streams[1]))
    )
    found = moments(Batches(8, 96, mine, theirs, 128 if added else 0), CPU, Ranks())
    one, both = (Rounder(found, method).round(weight, scheme, "w") for method in ("gptq", "qep"))
    assert (one.method, both.method) == ("gptq", "qep")

    def error(rounded):
        held, w = parts[7], 1.0 if weights is None else weights[parts[7]].double()
        missed = reference[held].double() @ weight.double().T - rows[held].double() @ rounded.double().T
        if added:
            missed += (streams[1] - streams[0])[held].double()
        return float((missed * w).norm() / (rows[held].double() @ weight.double().T * w).norm())

    nearest, _ = quantizer.quantize(weight, scheme, "w")
    assert both.error == pytest.approx(error(both.weight), rel=1e-3)
    assert both.nearest == pytest.approx(error(dequantize(nearest, scheme)), rel=1e-3)
    assert error(both.weight) < 0.9 * error(one.weight)


def test_one_stream_is_rounded_by_it_alone():
    """As an expert, whose tokens differ between the streams."""
    inputs, weight = correlated(3000, 96), torch.randn(128, 96)
    one, both = (Rounder(of(inputs), method).round(weight, SCHEMES["row"], "w") for method in ("gptq", "qep"))
    assert both.method == "gptq"
    assert torch.equal(one.weight, both.weight)
