"""Real-quant layers: ModelOpt converts megatron-core's layer of mptq's modules, with and without weights."""

import contextlib
import io
import logging
import warnings

import modelopt.torch.quantization as mtq
import pytest
import torch

from mptq import BlockwiseFP8WeightTransformerLayer, FP8WeightTransformerLayer, RealQuantTransformerLayer
from mptq.errors import CheckpointError, OptionError
from mptq.layers.linear import Linear
from mptq.layers.transformer_config import transformer_config
from mptq.layers.transformer_layer import _single_process, build_layer, submodules
from mptq.quantize import quantizer
from mptq.quantize.modelopt import quant_config
from mptq.recipes.schemes import SCHEMES
from tests.support.models import ARGS, LATENT, MOE_ARGS, TENSORS, model

KINDS = {"tensor": FP8WeightTransformerLayer, "block": BlockwiseFP8WeightTransformerLayer}
MODELS = {"dense": ARGS, "experts": MOE_ARGS, "latent": LATENT}


def config_of(fields):
    return model(fields, {name: type(spec)(name, "bfloat16", spec.shape) for name, spec in TENSORS.items()})


def weights_of(layer):
    torch.manual_seed(0)
    return {name: torch.randn(weight.shape).to(weight.dtype) / 8 for name, weight in layer.named_parameters()}


def built(kind, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(transformer_config(config), submodules(config, 0), layer_number=1, pg_collection=_single_process())


def linears_of(layer):
    return {name: module for name, module in layer.named_modules() if isinstance(module, Linear)}


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("fields", [ARGS, MOE_ARGS], ids=["dense", "experts"])
def test_weights_are_rounded_as_they_are_loaded(fields, scheme):
    config = config_of(fields)
    weights, layer = weights_of(build_layer(config, 0)), built(KINDS[scheme], config)
    assert all(module.weight.is_meta for module in linears_of(layer).values())
    layer.load_state_dict(weights, strict=False)
    for name, module in linears_of(layer).items():
        expected, error = quantizer.quantize(weights[f"{name}.weight"], SCHEMES[scheme], "w")
        assert torch.equal(module.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(module.weight_quantizer._scale, expected.scale)
        assert module.weight_quantizer.error == error
    assert not hasattr(layer, "_modelopt_state")
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    rows = {name: row for name, *row in layer.tensor_table()}
    name, module = next(iter(linears_of(layer).items()))
    shape = str(list(module.weight.shape))
    assert rows[f"{name}.weight"] == ["bfloat16", shape, "float8_e4m3fn", shape]
    assert rows[f"{name}.weight_quantizer._scale"][:3] == ["-", "-", "float32"]


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_modelopt_quantizes_and_compresses_a_layer_with_weights(fields):
    """`mtq.quantize` with a forward loop, which calibrates the inputs, and `mtq.compress`."""
    config = config_of(fields)
    layer = build_layer(config, 0)
    weights = weights_of(layer)
    layer.load_state_dict(weights, assign=True)
    layer.collect()
    seen = []
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        mtq.quantize(layer, quant_config(SCHEMES["tensor-static"]), seen.append)
        mtq.compress(layer)
    layer.finish()
    assert seen == [layer]
    for name, module in linears_of(layer).items():
        expected, _ = quantizer.quantize(weights[f"{name}.weight"], SCHEMES["tensor"], "w")
        assert torch.equal(module.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert module.input_quantizer.is_enabled
    assert not hasattr(layer, "_modelopt_state")


def test_a_second_weight_is_refused():
    config = config_of(ARGS)
    weights, layer = weights_of(build_layer(config, 0)), built(FP8WeightTransformerLayer, config)
    layer.load_state_dict(weights, strict=False)
    with pytest.raises(CheckpointError, match=r"linear_.*weight: the linear has a compressed weight already"):
        layer.load_state_dict(weights, strict=False)


def test_an_unknown_config_is_refused():
    kind = type("Own", (RealQuantTransformerLayer,), {"real_quant_cfg": "int4_real_quant"})
    with pytest.raises(OptionError, match="^Own has no real_quant_cfg 'int4_real_quant': use fp8_real_quant or fp8_blockwise_"):
        built(kind, config_of(ARGS))


def test_the_table_is_logged_if_asked_for(caplog):
    kind = type("Verbose", (FP8WeightTransformerLayer,), {"verbose": True})
    with caplog.at_level(logging.INFO, "mptq.layers.real_quant"):
        built(kind, config_of(ARGS))
    assert "self_attention.linear_qkv.weight " in caplog.text
