"""ModelOpt's conversions with mptq's quantizer of weights: `mtq.quantize` and `mtq.compress` of linears that have weights."""

import contextlib
import io
import warnings

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator
from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.nn.modules.quant_linear import RealQuantLinear
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

from mptq.quantize import quantizer
from mptq.quantize.compressed_linears import Matrix
from mptq.quantize.modelopt import convert, quant_config
from mptq.quantize.weight_quantizer import WeightQuantizer
from mptq.recipes.schemes import SCHEMES


def converted(weight, config, kind=Matrix):
    """A linear with `weight`, quantized and compressed by ModelOpt."""
    linear = kind(tuple(weight.shape), weight.dtype) if kind is Matrix else kind(*reversed(weight.shape), bias=False)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    convert(torch.nn.ModuleDict({"linear": linear}), config)
    return linear


# ModelOpt has no setting for power-of-two scales: CompressedLinears asks for them.
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES.values() if not scheme.powers], ids=lambda one: one.name)
def test_a_linear_with_weights_is_compressed_to_the_same_bytes(scheme):
    torch.manual_seed(0)
    weight = torch.randn(300, 192).bfloat16()
    weight[:128, :128] = 0
    linear = converted(weight, quant_config(scheme))
    expected, error = quantizer.quantize(weight, scheme, "w")
    assert torch.equal(linear.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(linear.weight_quantizer._scale, expected.scale)
    assert linear.weight_quantizer.error == error


def test_a_calibrated_amax_decides_the_scale():
    """Here 0.9 of the largest magnitude, as a search for the smallest error may find."""
    torch.manual_seed(0)
    weight = torch.randn(256, 128)
    linear = Matrix((256, 128), torch.float32)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    holder = torch.nn.ModuleDict({"linear": linear})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        mtq.quantize(holder, quant_config(SCHEMES["row"]))
        linear.weight_quantizer._amax.mul_(0.9)
        mtq.compress(holder)
    amax = weight.abs().amax(1, keepdim=True) * 0.9
    assert torch.equal(linear.weight_quantizer._scale, amax / 448)
    assert torch.equal(linear.weight_quantizer._amax, amax)
    expected = (weight / (amax / 448)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(linear.weight.data.view(torch.uint8), expected.view(torch.uint8))


NVFP4 = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "*weight_quantizer",
            "cfg": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
        },
    ],
    "algorithm": "max",
}


def test_a_format_that_no_scheme_covers_is_rounded_by_modelopt():
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16()
    ours, theirs = converted(weight, NVFP4), converted(weight, NVFP4, torch.nn.Linear)
    assert ours.weight.metadata["qtensor_class"] is NVFP4QTensor
    assert isinstance(ours.weight_quantizer, WeightQuantizer)
    assert ours.weight_quantizer.error is None
    assert torch.equal(ours.weight.data, theirs.weight.data)
    for name, buffer in theirs.weight_quantizer.named_buffers():
        assert torch.equal(ours.weight_quantizer.get_buffer(name).float(), buffer.float())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (TensorQuantizer, "_real_quantize"),
        (TensorQuantizer, "_get_amax"),
        (TensorQuantizer, "_set_buffer"),
        (TensorQuantizer, "_setup_for_blockquant"),
        (TensorQuantizer, "_fake_quantize"),
        (TensorQuantizer, "_skip_properties_for_save_restore"),
        (RealQuantLinear, "_setup"),
    ],
)
def test_modelopt_has_the_private_attributes_that_mptq_uses(owner, name):
    """An update of ModelOpt that moves one of them fails here by name (docs/dev/architecture.md lists them)."""
    assert name in vars(owner)


SETTINGS = ("_block_sizes", "_num_bits", "_axis", "_dynamic", "_fake_quant", "_dequantize", "_input_dtype", "_calibrator")


@pytest.mark.parametrize("name", SETTINGS)
def test_modelopts_quantizers_keep_their_settings_where_mptq_reads_them(name):
    assert name in vars(TensorQuantizer())


def test_compressed_weights_are_modelopts_tensors():
    linear = converted(torch.ones(8, 8), quant_config(SCHEMES["tensor"]))
    assert linear.weight.metadata == {"shape": (8, 8), "dtype": torch.float32, "qtensor_class": FP8QTensor}


def test_modelopts_calibrators_and_algorithms_are_where_mptq_reads_them():
    quantizer = TensorQuantizer()
    for kind, name in ((MaxCalibrator, "_calib_amax"), (HistogramCalibrator, "_calib_hist")):
        calibrator = kind(num_bits=(4, 3), axis=None, unsigned=False)
        assert getattr(calibrator, name) is None
        calibrator.collect(torch.ones(4))
        assert getattr(calibrator, name) is not None
    assert hasattr(quantizer, "_calibrator")
    assert "_calib_func" in BaseCalibrateModeDescriptor.__annotations__
