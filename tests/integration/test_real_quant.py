"""mptq's real-quant layers in a megatron-core GPTModel: loading a checkpoint gives the bytes that `mptq quantize` writes."""

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
    stored = [name for name in output.tensors if "linear_" in name and "layer_norm" not in name]
    assert len(stored) > 20
    for name in stored:
        spec = output.tensors[name].spec
        expected = Reader(output).read(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))
        mine = found["tensors"][name.replace("experts.experts", "experts.local_experts")]
        assert mine.dtype == expected.dtype
        assert torch.equal(mine.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), name
    before, shape, after, same = found["table"]["self_attention.linear_qkv.weight"]
    assert (before, after, shape) == ("bfloat16", "float8_e4m3fn", same)
    assert found["table"]["self_attention.linear_qkv.weight_quantizer._scale"][:3] == ("-", "-", "float32")
