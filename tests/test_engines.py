"""The outputs, loaded by megatron-core + ModelOpt and by transformers, against each other's logits."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

from mptq.quantize.fp8 import dequantize
from mptq.types import Fp8Weight
from tests.conftest import ROOT, run

RECIPES = ("fp8-blockwise", "fp8-per-channel", "fp8-per-tensor")


def plain(modes, tmp_path, hf, checkpoint, recipe="fp8-blockwise"):
    """Token ids and logits by mode, from one fresh process of megatron-core."""
    options = ["--hf", hf, "--checkpoint", checkpoint, "--recipe", recipe, "--out", tmp_path]
    run(sys.executable, "-m", "tests.plain_megatron", *modes, *options, PYTHONPATH=str(ROOT))
    return [torch.load(tmp_path / f"{mode}.pt") for mode in modes]


def distance(left, right):
    """Largest difference, relative to the largest logit."""
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["aligned", "crossing"])
def test_megatron_restores_what_was_compressed(quantized, model, recipe, request, tmp_path):
    hf, checkpoint = request.getfixturevalue(f"{model}_hf"), request.getfixturevalue(model)
    written = quantized[model, recipe] / "megatron" / "iter_0000100"
    (restored,) = plain(["restored"], tmp_path, hf, written)
    inprocess, layers, source = plain(["inprocess", "layers", "reference"], tmp_path, hf, checkpoint, recipe)
    assert torch.equal(restored["logits"], inprocess["logits"])
    # mptq's own layer differs in the attention kernel alone (scaled_dot_product_attention), in BF16: units of 2^-8.
    assert distance(layers["logits"], inprocess["logits"]) < 2e-2
    # It is a quantized model and no copy of the source: E4M3 moves the logits, but not far.
    assert 1e-3 < distance(restored["logits"], source["logits"]) < 0.2


def dequantized_llama(folder, block):
    """A float32 Llama of transformers with the output's weights, dequantized by hand."""
    tensors = load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + "_scale", tensors.get(name + "_scale_inv"))
        if tensor.dtype == torch.float8_e4m3fn:
            state[name] = dequantize(Fp8Weight(tensor, scale), block)
        elif not name.endswith(("_scale", "_scale_inv")):
            state[name] = tensor.float()
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_hf_and_megatron_outputs_are_the_same_model(quantized, aligned_hf, recipe, tmp_path):
    out = quantized["aligned", recipe]
    (found,) = plain(["dequantized"], tmp_path, aligned_hf, out / "megatron" / "iter_0000100", recipe)
    model = dequantized_llama(out / "hf", 128 if recipe == "fp8-blockwise" else None)
    with torch.no_grad():
        logits = model(found["ids"]).logits
    # Float32 on both sides: what is left is the order of sums. A wrong rotary permutation is at 1e-1.
    assert distance(logits, found["logits"]) < 2e-5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["aligned", "crossing"])
def test_transformers_loads_the_output_itself(quantized, model, recipe):
    out = quantized[model, recipe] / "hf"
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if recipe == "fp8-blockwise" else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    ours = dequantized_llama(out, 128 if recipe == "fp8-blockwise" else None)
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (2, 17))
    with torch.no_grad():
        # transformers dequantizes to BF16 and computes in it; per channel it also quantizes activations per token.
        assert distance(loaded(ids).logits, ours(ids).logits) < 0.1
