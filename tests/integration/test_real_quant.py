"""mptq's real-quant layers in a megatron-core GPTModel: loading a checkpoint gives the bytes that `mptq quantize` writes."""

import re

import pytest
import torch

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.formats.layout import canonical_weight
from mptq.formats.megatron import store
from mptq.formats.protocol import Stored
from mptq.quantize.compressed_linears import Matrix
from mptq.quantize.modelopt import convert, linear_state, modelopt_state
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


NVFP4 = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "*weight_quantizer",
            "cfg": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
        },
        {"quantizer_name": "*output_layer*", "enable": False},
    ],
    "algorithm": "max",
}


@pytest.mark.slow
def test_nvfp4_goes_through_modelopts_own_tensors_into_the_megatron_form(monkeypatch, aligned, aligned_hf, tmp_path):
    """No recipe offers it and no kernel of mptq covers it; plain megatron-core + ModelOpt restore it."""
    stored = {}

    def store_linear(layout, linear):
        matrix = Matrix(linear.spec.shape, torch.bfloat16)
        matrix.weight = torch.nn.Parameter(linear.source.clone(), requires_grad=False)
        convert(torch.nn.ModuleDict({"linear": matrix}), NVFP4)
        name = canonical_weight(linear.layer, linear.spec)
        stored[name] = matrix.weight_quantizer(matrix.weight)
        tensors, blob = linear_state(matrix)
        tensors |= zip(linear.spec.keys, matrix.weight.data.split(linear.spec.key_rows), strict=True)
        owner = name.removesuffix("weight")
        return Stored({owner + key: tensor for key, tensor in tensors.items()}, {f"{owner}_extra_state/shard_0_1": blob})

    monkeypatch.setattr(store, "store_linear", store_linear)
    monkeypatch.setattr(store, "modelopt_state", lambda *_: modelopt_state(NVFP4))
    run(make_plan(aligned, "fp8-per-tensor", ("megatron",)), tmp_path / "out", PLAIN)
    output = open_checkpoint(tmp_path / "out")
    assert {str(spec.dtype) for name, spec in output.specs.items() if name.endswith("mlp.linear_fc2.weight")} == {"uint8"}
    torch.save(stored, tmp_path / "weights.pt")
    for mode in ("restored", "replaced", "reference"):
        command = (mode, "--hf", aligned_hf, "--recipe", "nvfp4", "--checkpoint", output.directory, "--out", tmp_path)
        checked(python("-m", "tests.support.plain_megatron", *command))
    restored, replaced, reference = (
        torch.load(tmp_path / "nvfp4" / f"{mode}.pt")["logits"] for mode in ("restored", "replaced", "reference")
    )
    assert torch.equal(restored, replaced)
    assert 0.01 < distance(restored, reference) < 0.5
