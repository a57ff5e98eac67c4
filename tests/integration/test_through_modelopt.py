"""Every matrix that an output stores in FP8 comes out of one call of a ModelOpt quantizer, and nothing else is rounded.

Static scales come out of ModelOpt's calibration of the layer that hidden states pass through.
"""

import modelopt.torch.quantization as mtq
import pytest

from mptq import RealQuantTransformerLayer, make_plan, run
from mptq.quantize import quantizer
from mptq.quantize.weight_quantizer import TensorQuantizer, WeightQuantizer
from mptq.recipes.recipe import Calibration, load_recipe


@pytest.fixture
def calls(monkeypatch):
    """The shapes that each function was called with: ModelOpt's, mptq's quantizer of weights, and the kernels."""
    found = {"modelopt": [], "weight": [], "kernels": []}
    for name, owner, attribute in (
        ("modelopt", TensorQuantizer, "_real_quantize"),
        ("weight", WeightQuantizer, "_real_quantize"),
        ("kernels", quantizer, "quantize"),
    ):
        real = getattr(owner, attribute)

        def counted(*arguments, real=real, calls=found[name], at=0 if owner is quantizer else 1, **named):
            calls.append(tuple(arguments[at].shape))
            return real(*arguments, **named)

        monkeypatch.setattr(owner, attribute, counted)
    return found


@pytest.mark.parametrize("formats", [("hf",), ("megatron",), ("hf", "megatron")], ids=",".join)
@pytest.mark.parametrize(("model", "recipe"), [("aligned", "fp8-blockwise"), ("crossing", "fp8"), ("mixtral", "mxfp8")])
def test_one_call_for_each_stored_matrix(request, calls, model, recipe, formats, options, tmp_path):
    plan = make_plan(request.getfixturevalue(model), load_recipe(recipe), formats)
    run(plan, tmp_path / "out", options)
    stored = []
    for layout in plan.layouts.values():
        for layer, linear in plan.assignment.linears():
            if layout.scheme(layer, linear) is not None:
                stored += [shape for _, shape in linear.members] if layout.splits else [linear.shape]
    assert sorted(calls["weight"]) == sorted(calls["kernels"]) == sorted(stored)
    assert calls["modelopt"] == []  # it is what rounds a format that no scheme covers


@pytest.mark.parametrize("model", ["aligned", "mixtral"])
def test_modelopt_calibrates_each_layer_with_the_stream_as_forward_loop(request, monkeypatch, model, options, tmp_path):
    found, calibrate = [], mtq.calibrate

    def counted(layer, algorithm, forward_loop):
        def looped(given):
            assert given is layer
            assert isinstance(given, RealQuantTransformerLayer)
            found.append(algorithm["percentile"])
            forward_loop(given)

        return calibrate(layer, algorithm, looped)

    monkeypatch.setattr(mtq, "calibrate", counted)
    recipe = load_recipe("fp8").changed(kv_cache="fp8")
    recipe = recipe.model_copy(update={"calibration": Calibration(method="percentile", percentile=99.0)})
    plan = make_plan(request.getfixturevalue(model), recipe, ("megatron",))
    run(plan, tmp_path / "out", options)
    assert found == [99.0] * plan.model.num_layers
