import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import FP8QTensor

from mptq.errors import CheckpointError
from mptq.quantize.modelopt import modelopt_state, quant_config, quantize_weight
from mptq.recipe import Scheme
from tests import reference

BLOCK, TENSOR, ROW, MX = (Scheme(scale) for scale in ("block", "tensor", "row", "mx"))


@st.composite
def weights(draw):
    """Float32 matrices of any shape, many magnitudes, with zero rows, columns and blocks."""
    rows, columns = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns) * 2.0 ** draw(st.integers(-30, 30))
    weight *= torch.exp2(torch.randint(-12, 12, (rows, 1)).float())
    if draw(st.booleans()):
        weight = weight.bfloat16().float()
    if draw(st.booleans()):
        weight[:128, :128] = 0
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, columns - 1))] = 0
    return weight


@settings(max_examples=60, deadline=None)
@given(weights())
def test_blocks_equal_the_reference(weight):
    found = quantize_weight(weight.clone(), BLOCK, "w")
    data, scales = reference.block(weight)
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.scale, scales)
    assert torch.equal(found.data.view(torch.uint8), data)


@settings(max_examples=40, deadline=None)
@given(weights())
def test_one_scale_equals_the_reference(weight):
    found = quantize_weight(weight.clone(), TENSOR, "w")
    data, scale = reference.tensor(weight)
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == ()
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.data.view(torch.uint8), data)


@settings(max_examples=30, deadline=None)
@given(weights())
def test_rows_equal_the_reference(weight):
    found = quantize_weight(weight.clone(), ROW, "w")
    data, scales = reference.row(weight)
    assert torch.equal(found.scale, scales)
    assert torch.equal(found.data.view(torch.uint8), data)


@settings(max_examples=30, deadline=None)
@given(weights())
def test_equals_modelopts_fp8_tensor_on_float32(weight):
    weight = weight + (weight == 0) * 2.0**-100  # without all-zero blocks, where ModelOpt divides 0 by 0
    theirs, scale = FP8QTensor.quantize(weight, block_sizes={-1: 128, -2: 128})
    ours = quantize_weight(weight.clone(), BLOCK, "w")
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.data.view(torch.uint8), theirs._quantized_data.view(torch.uint8))
    theirs, scale = FP8QTensor.quantize(weight)
    ours = quantize_weight(weight.clone(), TENSOR, "w")
    assert torch.equal(ours.scale, scale.squeeze())
    assert torch.equal(ours.data.view(torch.uint8), theirs._quantized_data.view(torch.uint8))
    weight = weight + (weight.abs().amax(1, keepdim=True) == 0) * 2.0**-100
    theirs, scale = FP8QTensor.quantize(weight, axis=0)
    ours = quantize_weight(weight.clone(), ROW, "w")
    assert torch.equal(ours.scale, scale.reshape(-1, 1))
    assert torch.equal(ours.data.view(torch.uint8), theirs._quantized_data.view(torch.uint8))


@pytest.mark.parametrize("recipe", [BLOCK, TENSOR, ROW])
def test_all_zero_weight_has_scale_one(recipe):
    found = quantize_weight(torch.zeros(130, 200), recipe, "w")
    assert (found.scale == 1).all()
    assert (found.data.float() == 0).all()


@pytest.mark.parametrize(("recipe", "quantize"), [(BLOCK, reference.block), (TENSOR, reference.tensor), (ROW, reference.row)])
@pytest.mark.parametrize("amax", [1e-44, 2**-133, 2**-126, 3e38])
def test_the_ends_of_float32(recipe, quantize, amax):
    """Scales that would be zero, subnormal weights, and the largest ones."""
    weight = torch.linspace(-1, 1, 260 * 130).reshape(260, 130) * amax
    found = quantize_weight(weight.clone(), recipe, "w")
    data, scale = quantize(weight)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.data.view(torch.uint8), data)
    assert torch.isfinite(found.data.float()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", [BLOCK, TENSOR, ROW])
def test_values_that_are_not_finite_stop_the_run_by_name(recipe, value):
    weight = torch.randn(200, 130)
    weight[150, 7] = value
    with pytest.raises(CheckpointError, match=r"decoder\.x \[200, 130\] has 1 values .* first at \[150, 7\]"):
        quantize_weight(weight, recipe, "decoder.x")


def test_state_does_not_depend_on_the_hash_seed():
    """ModelOpt keeps its attributes in sets; the same run must give the same bytes."""
    import subprocess
    import sys

    code = (
        "import torch, hashlib; from mptq.quantize.modelopt import *; from mptq.recipe import Scheme; "
        "r = Scheme('block'); l = torch.nn.Linear(8, 8, bias=False); torch.manual_seed(0); "
        "compress_linear(l, torch.randn(8, 8), r, 'w'); "
        "print(hashlib.sha256(megatron_state(l)[1] + modelopt_state(r)).hexdigest())"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in "12"
    }
    assert len(prints) == 1


def test_configs_are_weight_only_and_leave_the_output_layer_alone():
    for scheme in (BLOCK, TENSOR, ROW, MX):
        rules = quant_config(scheme)["quant_cfg"]
        assert rules[0] == {"quantizer_name": "*", "enable": False}
        assert rules[-1] == {"quantizer_name": "*output_layer*", "enable": False}
        assert [rule["quantizer_name"] for rule in rules if "cfg" in rule] == ["*weight_quantizer"]
    assert b"real_quantize" in modelopt_state(BLOCK)


def test_configs_name_what_deviates():
    rules = quant_config(Scheme("tensor", static=True), kv_cache=True, others={"decoder.layers.0.mlp.linear_fc1": None})
    names = [(rule["quantizer_name"], rule.get("enable", True)) for rule in rules["quant_cfg"]]
    assert names == [
        ("*", False),
        ("*weight_quantizer", True),
        ("*input_quantizer", True),
        ("*decoder.layers.0.mlp.linear_fc1.weight_quantizer", False),
        ("*decoder.layers.0.mlp.linear_fc1.input_quantizer", False),
        ("*[kv]_bmm_quantizer", True),
        ("*output_layer*", False),
    ]
