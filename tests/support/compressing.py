"""ModelOpt's own conversion of mptq's layers, `mtq.quantize` and `mtq.compress` per linear, as a reference for the strips.

ModelOpt computes amax and scale in the dtype of the weight, so weights are converted to float32.
"""

import contextlib
import io
import warnings

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantModuleRegistry
from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear

from mptq.checkpoint.reader import Reader
from mptq.formats.layout import canonical_weight
from mptq.layers.linear import Linear
from mptq.layers.transformer_layer import build_layer
from mptq.model.tensors import megatron_layer
from mptq.pipeline.layer_quantizer import place
from mptq.quantize import mx
from mptq.quantize.modelopt import quant_config


class StockLinear(Linear):
    """mptq's linear with ModelOpt's own quantizers, which round without mptq's kernels."""

    def forward(self, x):
        """As in `Linear`. ModelOpt tells classes apart by their `forward`."""
        return super().forward(x)


QuantModuleRegistry.register({StockLinear: "tests.StockLinear"})(_QuantLinear)


def convert(module, config):
    """Quantize `module` in place, and compress it; calibration runs no data and collects only the weights' amax."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        holder = torch.nn.ModuleDict({"module": module})
        mtq.quantize(holder, config)
        if (amax := getattr(getattr(module, "weight_quantizer", None), "_amax", None)) is not None:
            # Without this, ModelOpt would divide 0 by 0, or by numbers close to 0.
            amax.copy_(torch.where(amax == 0, 448.0, amax.clamp(min=448 * 2.0**-39)))
        mtq.compress(holder)


def compress(linear, weight, scheme, input_amax):
    """Give `linear` the `weight` [out, in], quantized by `scheme`; None keeps its precision."""
    if type(linear) is Linear:
        linear.__class__ = StockLinear
    dtype = linear.weight.dtype
    source = weight if scheme is None else weight.float()
    linear.weight = torch.nn.Parameter(source.clone(), requires_grad=False)
    convert(linear, quant_config(scheme))
    if scheme is None:
        return
    linear.weight.metadata["dtype"] = dtype
    if input_amax is not None:
        linear.input_quantizer.amax = input_amax
    if scheme.scale == "mx":  # ModelOpt's exponent is a rounded logarithm, and its scale for zeros is 2 ** -127
        scale = mx.scales(source)
        factor = torch.exp2(127 - scale.float()).repeat_interleave(32, 1)
        linear.weight.data.copy_((source * factor).to(torch.float8_e4m3fn))
        linear.weight_quantizer._scale.copy_(scale)


def compressed_layer(plan, index, calibrated):
    """Layer `index` of the checkpoint of `plan`, compressed by ModelOpt, with activation scales from `calibrated`."""
    reader, layer = Reader(plan.source.checkpoint), build_layer(plan.model, index)

    def read(name, shape):
        out = torch.empty(shape, dtype=getattr(torch, plan.source.dtype(name)))
        return reader.read_parts(plan.source.places[name], out)

    for tensor in plan.unquantized(index):
        place(layer, tensor.parameter, read(megatron_layer(index) + tensor.megatron, tensor.shape))
    for linear in plan.linears(index):
        scheme = plan.layouts["megatron"].scheme(index, linear)
        static = scheme is not None and scheme.static
        weight = read(canonical_weight(index, linear), linear.shape)
        compress(layer.get_submodule(linear.module), weight, scheme, calibrated.amax[linear.module] if static else None)
    if plan.assignment.has_cache(index):
        attention = layer.self_attention.core_attention
        convert(attention, quant_config(None, kv_cache=True))
        attention.k_bmm_quantizer.amax, attention.v_bmm_quantizer.amax = (calibrated.amax[name] for name in ("key", "value"))
    return layer.requires_grad_(False)
