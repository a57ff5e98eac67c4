import io

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.plugins.megatron import quant_module_get_extra_state
from modelopt.torch.quantization.qtensor import FP8QTensor

from mptq.quantize import quantizer as quantize_quantizer
from mptq.quantize.compressed_linears import CompressedLinears
from mptq.quantize.fp8 import dequantize
from mptq.quantize.modelopt import _ordered, linear_state, modelopt_state, quant_config
from mptq.recipes.schemes import SCHEMES
from tests.support.compressing import compress

BLOCK, TENSOR, ROW, MX = (SCHEMES[scale] for scale in ("block", "tensor", "row", "mx"))


@st.composite
def weights(draw):
    """Float32 matrices of any shape and many magnitudes, with zero rows, columns and blocks."""
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


def in_range(weight):
    """Without all-zero blocks, for which ModelOpt divides 0 by 0, and tiny ones, for which it has no floor."""
    return weight * 2.0**40 + (weight == 0)


def converted(weight, scheme):
    """A linear that ModelOpt quantized and compressed."""
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    compress(linear, weight, scheme, None)
    return linear


@settings(max_examples=40)
@given(weights(), st.sampled_from([BLOCK, TENSOR, ROW]))
def test_equals_a_linear_quantized_by_modelopt(weight, scheme):
    weight = in_range(weight)
    theirs = converted(weight, scheme)
    ours, _ = quantize_quantizer.quantize(weight, scheme, "w")
    assert torch.equal(ours.data.view(torch.uint8), theirs.weight.data.view(torch.uint8))
    assert torch.equal(ours.scale.flatten(), theirs.weight_quantizer._scale.flatten())
    assert torch.equal(ours.amax.flatten(), theirs.weight_quantizer._amax.flatten())


@settings(max_examples=25)
@given(weights(), st.integers(-130, -20), st.sampled_from([BLOCK, TENSOR, ROW]))
def test_modelopt_computes_the_same_scale_from_amax(weight, exponent, scheme):
    """From either of the two, also for tiny weights, it gives the same scale, bytes and dequantized numbers."""
    assume(scheme is not BLOCK or max(weight.shape) > 128)  # for a single block ModelOpt computes the amax again
    weight = torch.where(weight == 0, 1.0, weight) * 2.0**exponent  # for all zeros ModelOpt's scale is 0
    theirs = converted(weight, scheme)  # compressed with mptq's amax (tests/support/compressing.py)
    ours, _ = quantize_quantizer.quantize(weight, scheme, "w")
    assert torch.equal(ours.amax.flatten(), theirs.weight_quantizer._amax.flatten())
    assert torch.equal(ours.scale.flatten(), theirs.weight_quantizer._scale.flatten())
    assert torch.equal(ours.scale, ours.amax / 448)
    assert torch.equal(ours.data.view(torch.uint8), theirs.weight.data.view(torch.uint8))
    theirs.weight_quantizer._scale.copy_((ours.amax / 448).view_as(theirs.weight_quantizer._scale))
    assert torch.equal(dequantize(ours, scheme), theirs.weight_quantizer(theirs.weight).float())


@settings(max_examples=40)
@given(st.integers(2, 300), st.integers(2, 300), st.sampled_from([BLOCK, TENSOR, ROW, MX]))
def test_state_equals_that_of_a_linear_quantized_by_modelopt(rows, columns, scheme):
    weight = torch.randn(rows, columns * 32 if scheme is MX else columns)
    ours = CompressedLinears({"linear": weight.shape}, {"linear": scheme}, torch.float32)
    tensors, state = linear_state(ours.compress("linear", weight, "w").linear)
    theirs = converted(weight, scheme)
    expected = _ordered(quant_module_get_extra_state(theirs))
    (packed,) = torch.load(io.BytesIO(state))
    with torch.serialization.safe_globals([type(theirs.weight.get_qtensor())]):
        assert torch.load(io.BytesIO(packed.numpy().tobytes())) == expected
    assert tensors.keys() == {f"weight_quantizer.{name}" for name, _ in theirs.weight_quantizer.named_buffers()}


def test_state_of_a_linear_that_is_left_alone():
    ours = CompressedLinears({"linear": (3, 4)}, {"linear": None}, torch.float32)
    tensors, blob = linear_state(ours.linear("linear"))
    (packed,) = torch.load(io.BytesIO(blob))
    assert tensors == {}
    state = torch.load(io.BytesIO(packed.numpy().tobytes()))
    assert all(quantizer["_disabled"] for quantizer in state["modelopt_quantizer_state"].values())
    assert "modelopt_q_tensor_state" not in state or not state["modelopt_q_tensor_state"]


@settings(max_examples=30)
@given(weights())
def test_equals_modelopts_fp8_tensor_on_float32(weight):
    weight = in_range(weight)
    for scheme, arguments in ((BLOCK, {"block_sizes": {-1: 128, -2: 128}}), (TENSOR, {}), (ROW, {"axis": 0})):
        theirs, scale = FP8QTensor.quantize(weight, **arguments)
        ours, _ = quantize_quantizer.quantize(weight, scheme, "w")
        assert torch.equal(ours.scale.flatten(), scale.flatten())
        assert torch.equal(ours.data.view(torch.uint8), theirs._quantized_data.view(torch.uint8))


@pytest.mark.slow
def test_state_does_not_depend_on_the_hash_seed():
    """ModelOpt keeps its attributes in sets; the same run must give the same bytes."""
    import subprocess
    import sys

    code = (
        "import torch, hashlib; from mptq.quantize.modelopt import *; from mptq.recipes.schemes import SCHEMES; "
        "from mptq.quantize.compressed_linears import CompressedLinears; r = SCHEMES['block']; "
        "made = CompressedLinears({'a': (8, 8)}, {'a': r}, torch.bfloat16).compress('a', torch.ones(8, 8), 'w'); "
        "print(hashlib.sha256(linear_state(made.linear)[1] + modelopt_state(quant_config(r))).hexdigest())"
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
    assert b"real_quantize" in modelopt_state(quant_config(BLOCK))


def test_configs_name_the_modules_with_another_scheme():
    rules = quant_config(SCHEMES["tensor-static"], kv_cache=True, others={"decoder.layers.0.mlp.linear_fc1": None})
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
