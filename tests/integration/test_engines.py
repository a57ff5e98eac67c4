"""Outputs loaded by megatron-core + ModelOpt and by transformers; their logits are compared with each other."""

from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from mptq import Options, make_plan, verify
from mptq import run as run_plan
from mptq.quantize.fp8 import dequantize
from mptq.types import Fp8Weight
from tests.conftest import RECIPES
from tests.support.plain_megatron import scheme_of
from tests.support.processes import checked, python

MODES = "inprocess", "layers", "reference"


def plain_all(modes, tmp_path, hf, checkpoints, *options):
    """Token ids and logits by recipe and mode, from one fresh process of megatron-core; `checkpoints` by recipe."""
    options = ["--hf", hf, "--recipe", *checkpoints, "--checkpoint", *checkpoints.values(), "--out", tmp_path, *options]
    checked(python("-m", "tests.support.plain_megatron", *modes, *options))
    return {
        str(recipe): {mode: torch.load(tmp_path / Path(recipe).stem / f"{mode}.pt") for mode in modes} for recipe in checkpoints
    }


def distance(left, right):
    """Largest difference, relative to the largest absolute value of `right`."""
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


MIXED = """
description: attention per channel, MLP in blocks, the first layer unchanged
weights: {scale: block, block_size: 128}
hf: deepseek-fp8
overrides:
- {pattern: '*.self_attention.*', recipe: fp8-per-channel}
- {pattern: 'decoder.layers.0.*', recipe: none}
"""


@pytest.fixture(scope="module")
def mixed(aligned, tmp_path_factory) -> tuple[Path, Path]:
    """A recipe of several schemes, and the aligned model's output with it."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "mixed.yaml").write_text(MIXED)
    run_plan(make_plan(aligned, str(folder / "mixed.yaml"), ("hf", "megatron")), folder / "out", Options(device="cpu"))
    assert verify(folder / "out", aligned).failures == []
    return folder / "mixed.yaml", folder / "out"


@pytest.fixture(scope="module")
def outputs(quantized, mixed) -> dict[str, dict[str, Path]]:
    """Outputs by model and recipe."""
    found = {model: {recipe: quantized[model, recipe] for recipe in RECIPES} for model in ("aligned", "crossing")}
    found["aligned"][str(mixed[0])] = mixed[1]
    return found


@pytest.fixture(scope="module")
def logits(outputs, request, tokens, tmp_path_factory):
    """By model, recipe and mode: logits of the written outputs, and of the quantized model in memory."""
    made = {}
    for model, written in outputs.items():
        hf, checkpoint = request.getfixturevalue(f"{model}_hf"), request.getfixturevalue(model)
        folder = tmp_path_factory.mktemp("logits")
        cache = ["--kv-cache", "fp8" if model == "crossing" else "none", "--dataset", tokens]
        checkpoints = {recipe: out / "megatron" / "iter_0000100" for recipe, out in written.items()}
        # Every recipe is restored before a mode imports mptq.
        later = ["restored_cache"] if model == "crossing" else ["dequantized"]
        of_output = plain_all(["restored", *later], folder, hf, checkpoints, *cache)
        modes = [*MODES, "inprocess_cache"] if model == "crossing" else MODES
        of_source = plain_all(modes, folder, hf, dict.fromkeys(checkpoints, checkpoint), *cache)
        made[model] = {Path(recipe).stem: of_output[recipe] | of_source[recipe] for recipe in written}
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe"), [*product(["aligned", "crossing"], RECIPES), ("aligned", "mixed")])
def test_megatron_restores_the_compressed_model(logits, model, recipe):
    found = {mode: values["logits"] for mode, values in logits[model][recipe].items()}
    assert torch.equal(found["restored"], found["inprocess"])
    # mptq's own layer differs only in the attention kernel (scaled_dot_product_attention), in BF16: units of 2^-8. If the
    # cache is FP8, it rounds K and V and megatron-core's local attention does not; with static scales a difference in the
    # last bit can move an input by a step of E4M3, 2^-4.
    assert distance(found["layers"], found["inprocess"]) < (2e-2 if model == "aligned" and recipe != "fp8" else 0.2)
    # Checks that the model is quantized and not a copy of the source: E4M3 changes the logits, but not by much.
    assert 1e-3 < distance(found["restored"], found["reference"]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_restores_the_scales_of_the_cache(logits, recipe):
    found = {mode: values["logits"] for mode, values in logits["crossing"][recipe].items()}
    assert torch.equal(found["restored_cache"], found["inprocess_cache"])
    assert 1e-4 < distance(found["restored_cache"], found["restored"]) < 0.2


def dequantized_hf(folder):
    """A float32 model of transformers with the output's weights, dequantized by the test."""
    tensors = load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + "_scale", tensors.get(name + "_scale_inv"))
        if tensor.dtype == torch.float8_e4m3fn:
            state[name] = dequantize(Fp8Weight(tensor, scale), scheme_of(tensor, scale))
        elif not name.endswith(("_scale", "_scale_inv")):
            state[name] = tensor.float()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    # Not load_state_dict: transformers fuses experts as it loads.
    model, info = getattr(transformers, *config.architectures).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, "mixed"])
def test_hf_and_megatron_outputs_are_the_same_model(logits, outputs, recipe):
    found = logits["aligned"][recipe]["dequantized"]
    (out,) = (out for name, out in outputs["aligned"].items() if Path(name).stem == recipe)
    with torch.no_grad():
        ours = dequantized_hf(out / "hf")(found["ids"]).logits
    # Float32 on both sides: the remaining difference is the order of sums. A wrong rotary permutation gives 1e-1.
    assert distance(ours, found["logits"]) < 2e-5


IN_TRANSFORMERS = ("fp8-blockwise", "fp8-per-channel", "fp8-per-tensor")
"""The recipes that transformers can read; it drops the scales of ModelOpt's form (docs/formats.md)."""


@pytest.mark.parametrize(
    ("model", "recipe"), [*product(["aligned", "crossing", "mixtral"], IN_TRANSFORMERS), ("aligned", "mixed")]
)
def test_transformers_loads_the_output_itself(quantized, quantized_mixtral, mixed, model, recipe):
    of_model = (
        quantized_mixtral if model == "mixtral" else {name: quantized[model, name] for name in RECIPES if model != "mixtral"}
    )
    out = (mixed[1] if recipe == "mixed" else of_model[recipe]) / "hf"
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if recipe == "fp8-blockwise" else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True, **options)
    # transformers has no FP8 cache, and does not read its scales in one of the dialects.
    assert all(name.endswith((".k_scale", ".v_scale")) for name in info["unexpected_keys"])
    assert not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    ours = dequantized_hf(out)
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (2, 17))
    with torch.no_grad():
        # transformers dequantizes to BF16 and computes in BF16; per channel it also quantizes activations per token.
        assert distance(loaded(ids).logits, ours(ids).logits) < 0.1


@pytest.fixture(scope="module")
def mixtral_logits(quantized_mixtral, mixtral_hf, mixtral, tokens, tmp_path_factory):
    """Logits by recipe and mode: of the written outputs, and of the quantized model in memory."""
    folder = tmp_path_factory.mktemp("logits")
    written = {recipe: out / "megatron" / "iter_0000100" for recipe, out in quantized_mixtral.items()}
    # Every recipe is restored before the second mode imports mptq.
    of_output = plain_all(["restored", "dequantized"], folder, mixtral_hf, written)
    modes = ["inprocess", "reference", "attention", "built"]
    of_source = plain_all(modes, folder, mixtral_hf, dict.fromkeys(written, mixtral), "--dataset", tokens)
    return {recipe: of_output[recipe] | of_source[recipe] for recipe in written}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "mxfp8"])
def test_mixture_of_experts(mixtral_logits, quantized_mixtral, recipe):
    found = {mode: values["logits"] for mode, values in mixtral_logits[recipe].items()}
    assert torch.equal(found["restored"], found["inprocess"])
    assert torch.equal(found["built"], found["attention"])
    assert 1e-3 < distance(found["restored"], found["reference"]) < 0.2
    model = dequantized_hf(quantized_mixtral[recipe] / "hf")
    with torch.no_grad():
        logits = model(mixtral_logits[recipe]["dequantized"]["ids"]).logits
    assert distance(logits, found["dequantized"]) < 2e-5
