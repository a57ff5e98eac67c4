"""Logits of plain megatron-core + ModelOpt, in a process that imports nothing of mptq unless the mode needs it.

    python -m tests.support.plain_megatron MODE ... --hf DIR --recipe NAME ... --checkpoint DIR ... --out FOLDER

Every mode is run with every recipe, each with its own checkpoint, and writes FOLDER/RECIPE/MODE.pt.

restored    a GPTModel with zero weights, `restore_sharded_modelopt_state`, `dist_checkpointing.load`: the written output
inprocess   the BF16 GPTModel with its linears replaced by those that ModelOpt compressed in this process (compressing.py)
..._cache   the same with mptq's core attention, whose quantizers round K and V as Transformer Engine's do with an FP8 cache
layers      the BF16 GPTModel with mptq's whole layers, compressed in the same way, instead of megatron-core's local ones
attention   the BF16 GPTModel with mptq's core attention
observed    the same, and the values seen on the way: the hidden states, and the largest magnitude of each linear's input
            (for the second linear of an expert, before the router's weights are applied)
spec        a GPTModel with mptq's real-quant layers in its layer spec, which has loaded the BF16 GPTModel's state; its tensors
built       the BF16 GPTModel with mptq's layers, which have its weights, instead of its own
replaced    the BF16 GPTModel with the weights of FOLDER/weights.pt, by their names in it
dequantized a float32 GPTModel with the output's weights dequantized to float32
reference   the unmodified BF16 GPTModel
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import make_checkpoint


def linears(layer):
    """Names of the modules to quantize."""
    return [name for name, _ in layer.named_modules() if name.rpartition(".")[2].startswith("linear_")]


def restored(model, options):
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    restore_sharded_modelopt_state([model], options.checkpoint)
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(options.checkpoint))
    result = model.load_state_dict(loaded, strict=False)
    assert not result.missing_keys
    assert not [key for key in result.unexpected_keys if "decoder" in key or "embedding" in key]


def _layers(options):
    """mptq's layers, compressed by ModelOpt in this process, with the activation scales that mptq calibrates."""
    from mptq.calibration.datasets.options import DataOptions
    from mptq.calibration.hidden_state_pair import HiddenStateOptions, HiddenStatePair
    from mptq.calibration.tokens import load_tokens
    from mptq.pipeline.context import RunContext
    from mptq.pipeline.layer_stream import LayerStream
    from mptq.plan.plan import make_plan
    from mptq.recipes.recipe import load_recipe
    from mptq.report.run_log import RunLog, Silent
    from tests.support.compressing import compressed_layer

    calibrated = {}

    class Kept(HiddenStatePair):
        """Keeps the calibration result of each layer."""

        def calibrate(self, index, layer, static):
            calibrated[index] = super().calibrate(index, layer, static)
            return calibrated[index]

    recipe = load_recipe(options.recipe).changed(kv_cache=options.kv_cache)
    plan = make_plan(options.checkpoint, recipe, ("hf", "megatron"))
    if recipe.needs_data:  # the same as `options` in tests/conftest.py
        tokens = load_tokens(DataOptions((str(options.dataset),), 6, 3, 32), None, plan.model.vocab_size, calibrate=True)
        states = Kept(plan, tokens, HiddenStateOptions(torch.device("cpu"), 4, 2**30, options.out, 16))
        for _ in LayerStream(RunContext(plan, torch.device("cpu"), RunLog(), Silent(), states)).outputs():
            pass
    _megatron_arithmetic()
    return [compressed_layer(plan, index, calibrated.get(index)) for index in plan.layers]


def _megatron_arithmetic():
    """Use megatron-core's products bit for bit; mptq's own sum in float32 on a CPU (layers/linear.py)."""
    import mptq.layers.linear

    mptq.layers.linear.project = torch.nn.functional.linear


def inprocess(model, options):
    for index, module in enumerate(_layers(options)):
        names = linears(module)
        if options.mode.endswith("cache"):
            names.append("self_attention.core_attention")
        for name in names:
            owner, _, attribute = name.rpartition(".")
            setattr(model.decoder.layers[index].get_submodule(owner), attribute, module.get_submodule(name))


def layers(model, options):
    for index, module in enumerate(_layers(options)):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        model.decoder.layers[index] = module


def spec(model, options):
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mptq import BlockwiseFP8WeightTransformerLayer, FP8WeightTransformerLayer, make_plan
    from mptq.layers.transformer_layer import submodules

    kinds = {"fp8-blockwise": BlockwiseFP8WeightTransformerLayer, "fp8-per-tensor": FP8WeightTransformerLayer}
    parts = submodules(make_plan(options.checkpoint, options.recipe, ("megatron",)).model, 0)
    quantized = make_checkpoint.build(options.args, ModuleSpec(module=kinds[options.recipe], submodules=parts)).eval()
    assert quantized.decoder.layers[0].self_attention.linear_qkv.weight.is_meta
    quantized.load_state_dict(model.state_dict(), strict=False)
    logits = forward(quantized, options.ids)
    table = {row[0]: row[1:] for row in quantized.decoder.layers[0].tensor_table()}
    tensors = {name: tensor for name, tensor in quantized.state_dict().items() if isinstance(tensor, torch.Tensor)}
    assert not any(parameter.requires_grad for parameter in quantized.decoder.layers.parameters())
    assert not [module for module in quantized.modules() if hasattr(module, "_modelopt_state")]
    return {"tensors": tensors, "table": table, "logits_of_spec": logits}


def restored_cache(model, options):
    import mptq.layers.real_quant  # registers the attention with Transformer Engine's quantizers

    assert mptq.layers.real_quant
    attention(model, options)
    restored(model, options)
    assert all(layer.self_attention.core_attention.k_bmm_quantizer.is_enabled for layer in model.decoder.layers)


def inprocess_cache(model, options):
    inprocess(model, options)


def attention(model, _options):
    from mptq.layers.attention import CoreAttention

    for layer in model.decoder.layers:
        layer.self_attention.core_attention = CoreAttention(layer.config)


class Largest:
    """Largest magnitudes by name, and hooks that collect them."""

    def __init__(self):
        self.amax = {}

    def keep(self, name, tensor):
        if tensor.numel():
            amax = tensor.abs().max().float()
            self.amax[name] = torch.maximum(self.amax.get(name, amax), amax)

    def of_input(self, name):
        return lambda _module, arguments: self.keep(name, arguments[0])

    def of_cache(self, name):
        def visit(_module, arguments):
            self.keep(f"{name}.key", arguments[1])
            self.keep(f"{name}.value", arguments[2])

        return visit

    def of_activation(self, name):
        def visit(_module, _arguments, out):
            gate, up = out[0].chunk(2, dim=-1)
            self.keep(name, torch.nn.functional.silu(gate) * up)

        return visit


def observed(model, options):
    attention(model, options)
    largest = Largest()
    found = {"amax": largest.amax}
    for name, module in model.decoder.named_modules():
        owner, _, last = name.rpartition(".")
        if last == "core_attention":
            module.register_forward_pre_hook(largest.of_cache(name))
        if "experts" in owner and last == "linear_fc1":
            module.register_forward_hook(largest.of_activation(f"{owner}.linear_fc2"))
        if last.startswith("linear_") and not ("experts" in owner and last == "linear_fc2"):
            module.register_forward_pre_hook(largest.of_input(name))
    model.decoder.final_layernorm.register_forward_pre_hook(
        lambda _module, arguments: found.update(hidden=arguments[0].clone())
    )
    return found


def built(model, options):
    from mptq.layers.transformer_layer import build_layer
    from mptq.plan.plan import open_source

    config = open_source(options.checkpoint).model
    for index, layer in enumerate(model.decoder.layers):
        module = build_layer(config, index)
        weights = {name: tensor for name, tensor in layer.state_dict().items() if not name.endswith("_extra_state")}
        module.load_state_dict(weights, assign=True)
        model.decoder.layers[index] = module


def replaced(model, options):
    for name, weight in torch.load(options.out / "weights.pt").items():
        model.get_parameter(name).data.copy_(weight)


def dequantized(model, options):
    from mptq.checkpoint.index import open_checkpoint
    from mptq.checkpoint.reader import Reader
    from mptq.quantize.fp8 import dequantize
    from mptq.types import Fp8Weight

    checkpoint = open_checkpoint(options.checkpoint)
    reader, names = Reader(checkpoint), checkpoint.tensors

    def read(name):
        spec = checkpoint.tensors[name].spec
        return reader.read(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))

    model.float()
    with torch.no_grad():
        for index, layer in enumerate(model.decoder.layers):
            for name in linears(layer):
                key = f"decoder.layers.{index}.{name}".replace("local_experts", "experts")
                parts = [read(f"{key}.{part}") for part in ("weight", "weight_w", "weight_v") if f"{key}.{part}" in names]
                data = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
                if data.dtype == torch.float8_e4m3fn:
                    scale = read(f"{key}.weight_quantizer._scale")
                    data = dequantize(Fp8Weight(data, scale), scheme_of(data, scale))
                layer.get_submodule(name).weight.copy_(data)


def scheme_of(data, scale):
    """The scheme of a weight, determined by the shape of its scales."""
    from mptq.recipes.schemes import SCHEMES

    if scale.dtype == torch.uint8:
        return SCHEMES["mx"]
    if scale.numel() == 1:
        return SCHEMES["tensor"]
    return SCHEMES["row" if scale.shape == (len(data), 1) else "block"]


def reference(_model, _options):
    """Change nothing."""


@torch.no_grad()
def forward(model, ids):
    """The logits of token ids [sequences, length]."""
    length = ids.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    return model(ids, torch.arange(length).expand(len(ids), -1), mask)


@torch.no_grad()
def continued(model, hf, prompt, tokens=2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(tokens):
        length = ids.shape[1]
        mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        following = model(ids, torch.arange(length)[None], mask)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return tokenizer.decode(ids[0])


def main():
    parser = argparse.ArgumentParser()
    quantized = (restored, restored_cache, inprocess, inprocess_cache, layers, spec, replaced, dequantized)
    modes = {function.__name__: function for function in (*quantized, attention, observed, built, reference)}
    parser.add_argument("modes", nargs="+", choices=modes)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--recipe", nargs="+", default=["fp8-blockwise"])
    parser.add_argument("--checkpoint", type=Path, nargs="+", help="one for each recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kv-cache", default="none")
    parser.add_argument("--dataset", type=Path, help="Megatron's indexed dataset, for recipes that calibrate")
    parser.add_argument("--prompt", help="continue this greedily by two tokens")
    options = parser.parse_args()

    make_checkpoint.without_cuda()
    make_checkpoint.stand_alone()
    config, weights = make_checkpoint.load_config(options.hf), make_checkpoint.load_weights(options.hf)
    settings = argparse.Namespace(hf=options.hf, out=Path("unused"), tp=1, pp=1, ep=1, vocab_divisor=128)
    args = make_checkpoint.parse(make_checkpoint.megatron_argv(config, settings))
    make_checkpoint.initialize(args)
    torch.manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (2, 17))
    options.args, options.ids = args, ids
    for mode, (recipe, checkpoint) in product(options.modes, zip(options.recipe, options.checkpoint, strict=True)):
        options.mode, options.recipe, options.checkpoint = mode, recipe, checkpoint
        model = make_checkpoint.build(args).eval()
        make_checkpoint.fill(model, weights, args)
        seen = modes[mode](model, options) or {}
        found = {"ids": ids, "logits": forward(model, ids)[..., : config["vocab_size"]]} | seen
        if options.prompt:
            found["text"] = continued(model, options.hf, options.prompt)
        folder = options.out / Path(recipe).stem
        folder.mkdir(exist_ok=True)
        torch.save(found, folder / f"{mode}.pt")


if __name__ == "__main__":
    main()
