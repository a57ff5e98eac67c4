"""Quantize one layer of a Megatron checkpoint by hand, with ModelOpt and mptq's RealQuantTransformerLayer.

    python examples/quantize_layer.py CKPT [--layer 0] [--save layer.pt]

This is what `mptq quantize` does to every layer, without calibration, streaming and writing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch

from mptq import RealQuantTransformerLayer, make_plan
from mptq.checkpoint.reader import Reader
from mptq.errors import MptqError
from mptq.formats.layout import canonical_weight
from mptq.layers.forward import run_layer
from mptq.layers.transformer_layer import build_layer
from mptq.model.tensors import megatron_layer
from mptq.pipeline.layer_quantizer import place
from mptq.plan.plan import Plan


def load_layer(plan: Plan, index: int) -> RealQuantTransformerLayer:
    """The layer with its weights from the checkpoint, whatever parallelism it was saved with."""
    layer, reader, dtype = build_layer(plan.model, index), Reader(plan.source.checkpoint), getattr(torch, plan.model.dtype)
    assert isinstance(layer, RealQuantTransformerLayer)
    tensors = {copy.parameter: (megatron_layer(index) + copy.megatron, copy.shape) for copy in plan.unquantized(index)}
    tensors |= {f"{linear.module}.weight": (canonical_weight(index, linear), linear.shape) for linear in plan.linears(index)}
    for parameter, (name, shape) in tensors.items():
        place(layer, parameter, reader.read_parts(plan.source.places[name], torch.empty(shape, dtype=dtype)))
    return layer


def main() -> None:
    """Print the tensors of the layer before and after, and the error of its output for random inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--save", type=Path, help="file for the FP8 weights, by name")
    options = parser.parse_args()
    try:
        plan = make_plan(options.checkpoint, "fp8-blockwise")
    except MptqError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    if not 0 <= options.layer < plan.model.num_layers:
        parser.error(f"--layer {options.layer}: the model has layers 0 to {plan.model.num_layers - 1}")
    layer = load_layer(plan, options.layer)
    torch.manual_seed(0)
    hidden = torch.randn(1, 64, plan.model.hidden_size).to(getattr(torch, plan.model.dtype))
    before = run_layer(layer, plan.model, hidden).float()

    layer.collect()  # remembers the tensors for the table
    mtq.quantize(layer, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)  # puts a quantizer beside each weight
    mtq.compress(layer)  # rounds each weight; only the codes and scales stay
    layer.finish()  # freezes it

    for row in layer.tensor_table():
        print("{:<48} {:<10} {:<14} -> {:<14} {}".format(*row))
    after = run_layer(layer, plan.model, hidden).float()
    print(f"relative error of the output: {float((after - before).norm() / before.norm()):.4f}")
    if options.save:
        modules = ((linear.module, layer.get_submodule(linear.module)) for linear in plan.linears(options.layer))
        torch.save({name: module.weight.data.view(torch.uint8) for name, module in modules}, options.save)


if __name__ == "__main__":
    main()
