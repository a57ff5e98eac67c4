"""Hugging Face forms that transformers itself can load, checked by what its linears compute (scripts/hf_output.py)."""

import hf_output
import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from mptq import Options, load_recipe, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.recipes.recipe import recipe_from

BLOCKS = {"description": "of a test", "weights": {"scale": "block", "block_size": 128}, "hf": "deepseek-fp8"}
TENSORS = {"description": "of a test", "weights": {"scale": "tensor"}, "activations": "static", "hf": "compressed-tensors"}
ROWS = {"description": "of a test", "weights": {"scale": "row"}, "hf": "compressed-tensors"}
ATTENTION_BY_ROWS = [{"pattern": "*self_attn*", "recipe": "fp8-per-channel"}]
FIRST_KEPT = [{"pattern": "decoder.layers.0.*", "recipe": "none"}]
E4M3 = 1e-2
"""A weight that is closer to the source than this is not quantized."""


@pytest.fixture(scope="module")
def written(aligned, tokens, tmp_path_factory):
    """Outputs of the aligned model by name, one for each form that no unmodified built-in recipe writes."""
    changes = {
        "two groups": BLOCKS | {"overrides": ATTENTION_BY_ROWS},
        "static": TENSORS,
        "static, cache": TENSORS | {"kv_cache": "fp8"},
        "rows, cache": ROWS | {"kv_cache": "fp8"},
        "blocks, cache": BLOCKS | {"kv_cache": "fp8"},
        "blocks, first kept": BLOCKS | {"overrides": FIRST_KEPT},
        "rows, first kept": ROWS | {"overrides": FIRST_KEPT},
    }
    options = Options(device="cpu", data=DataOptions((str(tokens),), calib_size=4, eval_size=1, seq_length=16))
    folder, made = tmp_path_factory.mktemp("written"), {}
    for name, fields in changes.items():
        made[name] = folder / name.replace(", ", "-").replace(" ", "-")
        run(make_plan(aligned, recipe_from(fields | {"name": "own"}, name)), made[name], options)
    return made


def columns(folder):
    """Relative error of the columns of each linear that transformers loads, against the file's; and the file's tensors."""
    tensors = hf_output.load_tensors(folder)
    blocks = hf_output.load_config(folder)["quant_method"] == "fp8"
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if blocks else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))  # compressed-tensors dequantizes on the first call
        linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
        return {name: hf_output.column_error(module, [name], tensors) for name, module in linears.items()}, tensors


FORMS = "two groups", "static", "static, cache", "rows, cache", "blocks, cache", "blocks, first kept", "rows, first kept"


@pytest.mark.parametrize("form", FORMS)
def test_linears_compute_with_the_weights_of_the_file(written, form):
    errors, tensors = columns(written[form])
    assert len(errors) == 4 * 7
    assert max(errors.values()) < hf_output.NOISE
    kept = [name for name in errors if tensors[f"{name}.weight"].dtype == torch.bfloat16]
    assert len(kept) == (7 if "kept" in form else 0)


@pytest.mark.parametrize("recipe", ["fp8-blockwise", "fp8-blockwise-ue8m0", "fp8-per-channel", "fp8-per-tensor"])
def test_linears_of_recipes(quantized, recipe):
    errors, _ = columns(quantized["aligned", recipe] / "hf")
    assert max(errors.values()) < hf_output.NOISE


def test_the_file_is_close_to_the_source(written, aligned_hf):
    source = hf_output.load_tensors(aligned_hf)
    for form, folder in written.items():
        tensors = hf_output.load_tensors(folder)
        for name in (name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")):
            weight, found = source[f"{name}.weight"].float(), hf_output.weight(tensors, name)
            error = float((found - weight).norm() / weight.norm())
            assert error == 0 if "kept" in form and ".layers.0." in name else E4M3 < error < 0.06, (form, name)


def test_a_wrong_scale_is_detected(written, tmp_path):
    """Test the check itself: the loaded scales differ from those of the file."""
    tensors = hf_output.load_tensors(written["static"])
    module = "model.layers.1.mlp.down_proj"
    weight, scale = hf_output.weight(tensors, module), float(tensors[f"{module}.input_scale"])

    def engine(inputs, scale):
        limited = (inputs.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (limited @ weight.t()).bfloat16()

    assert hf_output.column_error(lambda inputs: engine(inputs, scale), [module], tensors) < hf_output.NOISE
    for wrong in (1.0, scale * 1.05, scale / 3):
        assert hf_output.column_error(lambda inputs, wrong=wrong: engine(inputs, wrong), [module], tensors) > 0.02


def test_transformers_does_not_read_modelopts_form(aligned, tokens, tmp_path):
    """It loads the float8 values as weights, with a warning, and continues (docs/formats.md): unusable for `fp8`."""
    options = Options(device="cpu", data=DataOptions((str(tokens),), calib_size=4, eval_size=0, seq_length=16))
    run(make_plan(aligned, load_recipe("fp8")), tmp_path / "out", options)
    tensors = hf_output.load_tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(model.get_submodule(name).weight.float(), tensors[f"{name}.weight"].float())
