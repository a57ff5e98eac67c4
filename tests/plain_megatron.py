"""Logits of plain megatron-core + ModelOpt, in a process that has nothing of mptq in it unless the mode says so.

    python -m tests.plain_megatron MODE ... --hf DIR --checkpoint DIR --out FOLDER     # FOLDER/MODE.pt

restored    a GPTModel with zero weights, `restore_sharded_modelopt_state`, `dist_checkpointing.load`: the written output
inprocess   the BF16 GPTModel with its linears replaced by those that mptq's pipeline compressed in this process
layers      the BF16 GPTModel with whole layers of mptq's instead of megatron-core's local ones
dequantized a float32 GPTModel with the output's weights dequantized to float32
reference   the BF16 GPTModel as it is
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import make_checkpoint

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


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
    from mptq.plan import make_plan
    from mptq.record import Record, Silent
    from mptq.stream import LayerStream

    plan = make_plan(options.checkpoint, options.recipe, ("megatron",))
    stages = LayerStream(plan, torch.device("cpu"), Record(), Silent())
    for index in range(plan.model.num_layers):
        yield index, stages.layer(index)[0]


def inprocess(model, options):
    for index, module in _layers(options):
        for name in LINEARS:
            owner, _, attribute = name.rpartition(".")
            setattr(model.decoder.layers[index].get_submodule(owner), attribute, module.get_submodule(name))


def layers(model, options):
    for index, module in _layers(options):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        model.decoder.layers[index] = module


def dequantized(model, options):
    from mptq.checkpoint.index import open_checkpoint
    from mptq.checkpoint.reader import Reader
    from mptq.quantize.fp8 import dequantize
    from mptq.types import Fp8Weight

    checkpoint = open_checkpoint(options.checkpoint)
    reader = Reader(checkpoint)

    def read(name):
        spec = checkpoint.tensors[name].spec
        return reader.read(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))

    model.float()
    block = 128 if "block" in options.recipe else None
    with torch.no_grad():
        for index, layer in enumerate(model.decoder.layers):
            for name in LINEARS:
                key = f"decoder.layers.{index}.{name}"
                names = [f"{key}.weight_w", f"{key}.weight_v"] if name.endswith("fc1") else [f"{key}.weight"]
                data = torch.cat([read(part).view(torch.uint8) for part in names]).view(torch.float8_e4m3fn)
                weight = Fp8Weight(data, read(f"{key}.weight_quantizer._scale"))
                layer.get_submodule(name).weight.copy_(dequantize(weight, block))


def reference(_model, _options):
    """Nothing to change."""


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
    modes = {function.__name__: function for function in (restored, inprocess, layers, dequantized, reference)}
    parser.add_argument("modes", nargs="+", choices=modes)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--recipe", default="fp8-blockwise")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", help="continue this greedily by two tokens")
    options = parser.parse_args()

    make_checkpoint.without_cuda()
    make_checkpoint.stand_alone()
    config, weights = make_checkpoint.load_config(options.hf), make_checkpoint.load_weights(options.hf)
    settings = argparse.Namespace(hf=options.hf, out=Path("unused"), tp=1, pp=1, vocab_divisor=128)
    args = make_checkpoint.parse(make_checkpoint.megatron_argv(config, settings))
    make_checkpoint.initialize(args)
    torch.manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (2, 17))
    length = ids.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    for mode in options.modes:
        model = make_checkpoint.build(args).eval()
        make_checkpoint.fill(model, weights, args)
        modes[mode](model, options)
        with torch.no_grad():
            logits = model(ids, torch.arange(length).expand(2, -1), mask)
        found = {"ids": ids, "logits": logits[..., : config["vocab_size"]]}
        if options.prompt:
            found["text"] = continued(model, options.hf, options.prompt)
        torch.save(found, options.out / f"{mode}.pt")


if __name__ == "__main__":
    main()
