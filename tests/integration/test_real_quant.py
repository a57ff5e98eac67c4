"""mptq's real-quant layers in a megatron-core GPTModel: loading a checkpoint gives the bytes that `mptq quantize` writes."""

import re

import pytest
import torch

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from tests.integration.test_engines import distance
from tests.support.processes import checked, python

PLAIN = Options(device="cpu", data=DataOptions((), eval_size=0))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["aligned", "crossing", "mixtral"])
@pytest.mark.parametrize("recipe", ["fp8-per-tensor", "fp8-blockwise"])
def test_a_gptmodel_of_real_quant_layers_has_the_bytes_of_the_output(request, model, recipe, tmp_path):
    checkpoint, hf = request.getfixturevalue(model), request.getfixturevalue(f"{model}_hf")
    run(make_plan(checkpoint, recipe, ("megatron",)), tmp_path / "out", PLAIN)
    output = open_checkpoint(tmp_path / "out")
    for mode, source in (("restored", output.directory), ("spec", checkpoint)):
        command = (mode, "--hf", hf, "--recipe", recipe, "--checkpoint", source, "--out", tmp_path)
        checked(python("-m", "tests.support.plain_megatron", *command))
    found = torch.load(tmp_path / recipe / "spec.pt")
    restored = torch.load(tmp_path / recipe / "restored.pt")["logits"]
    assert distance(found["logits_of_spec"][..., : restored.shape[-1]], restored) < 2e-2
    reader, parts = Reader(output), {}
    for name, tensor in output.tensors.items():
        if "linear_" in name and "layer_norm" not in name:
            value = reader.read(name, torch.empty(tensor.spec.shape, dtype=getattr(torch, tensor.spec.dtype)))
            module = name.replace("experts.experts", "experts.local_experts")
            parts.setdefault(re.sub("weight_[wv]$", "weight", module), {})[name] = value.flatten()
    assert len(parts) > 20
    for name, values in parts.items():
        expected = torch.cat([values[part].view(torch.uint8) for part in sorted(values, reverse=True)])  # weight_w, weight_v
        assert torch.equal(found["tensors"][name].flatten().view(torch.uint8), expected), name
    before, shape, after, same = found["table"]["self_attention.linear_qkv.weight"]
    assert (before, after, shape) == ("bfloat16", "float8_e4m3fn", same)
    assert found["table"]["self_attention.linear_qkv.weight_quantizer._scale"][:3] == ("-", "-", "float32")
