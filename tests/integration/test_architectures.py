"""Every architecture, from a checkpoint written by megatron-core to transformers: names, config and logits.

The models and megatron-core's own float32 logits are those of tests/support/zoo.py. Thresholds are relative, for float32
logits: the remaining difference is the order of sums (1e-6); a rotary embedding permuted in one head moves the KL by 1e-3
and more (tests/support/zoo_checks.py).
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.errors import UnsupportedModelError
from mptq.model.architectures.config_json import config_fields
from mptq.model.architectures.registry import family_of
from mptq.plan.estimates import components, warnings
from mptq.plan.plan import SourceOptions, open_source
from mptq.recipes.recipe import load_recipe
from mptq.verification.structure import verify
from tests.integration.test_engines import distance
from tests.support.driving import Driven, float32, tokens_of, transformers_model, weights_of
from tests.support.zoo import ZOO, observed

pytestmark = pytest.mark.slow

# transformers has no class for the first; mptq's table of families lacks a feature of the others. The errors name the feature.
NOT_HF = {
    "partial-rotary": "partial rotary embeddings: yes",
    "gpt-oss": "attention sinks: yes",
}
# No argument of Megatron-LM specifies its gate: see its own test.
GEMMA = "gemma"
MAMBA = ("nemotron-h", "nemotron-h-moe")
ARCHITECTURES = [name for name in ZOO if name not in NOT_HF and name != GEMMA]
CLOSE = 5e-6
CONVERT = Options(device="cpu", data=DataOptions((), eval_size=0))
# GPT-2's linears are transposed, which engines do not read in FP8; OPT is the same function.
CLASSES = {"GPT2LMHeadModel": "OPTForCausalLM"}


def kl(left, right):
    left, right = (part.double().log_softmax(-1) for part in (left, right))
    return float((left.exp() * (left - right)).sum(-1).mean())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_converted_model_gives_the_same_logits_in_transformers(zoo, name, tmp_path):
    expected = observed(zoo(name))
    run(make_plan(zoo(name) / "ckpt", "none"), tmp_path / "out", CONVERT)
    assert verify(tmp_path / "out", zoo(name) / "ckpt").failures == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    cls = getattr(transformers, CLASSES.get(ZOO[name].hf, ZOO[name].hf))
    assert config["architectures"] == [cls.__name__]
    assert "quantization_config" not in config
    model, found = cls.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        logits = model.eval()(expected["ids"]).logits
    assert distance(logits, expected["logits"]) < CLOSE
    assert kl(expected["logits"], logits) < 1e-9


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in MAMBA])
def test_streams_match_the_whole_model_and_the_quantized_output(zoo, name, tmp_path):
    expected = observed(zoo(name))
    shape = expected["logits"].shape
    plan = float32(make_plan(zoo(name) / "ckpt", load_recipe("fp8-per-channel")))
    driven = Driven(plan, tokens_of(expected["ids"]), tmp_path)
    reference, quantized = (logits.view(shape) for logits in driven.streams.logits)
    assert distance(reference, expected["logits"]) < CLOSE
    run(make_plan(zoo(name) / "ckpt", "none"), tmp_path / "bf16", CONVERT)
    weights, _ = weights_of(driven.tensors["hf"], plan.recipe.scheme)
    with torch.no_grad():
        theirs = transformers_model(tmp_path / "bf16", weights)(expected["ids"]).logits
    assert distance(quantized, theirs) < 2e-5
    assert distance(theirs, expected["logits"]) > 1e-3


@pytest.mark.parametrize("name", ["gpt-oss", "partial-rotary"])
def test_a_model_that_hugging_face_cannot_express_has_a_megatron_output(zoo, name, tmp_path):
    with pytest.raises(UnsupportedModelError, match=NOT_HF[name]) as error:
        make_plan(zoo(name) / "ckpt", "fp8-per-channel")
    assert "--format megatron" in str(error.value)
    expected = observed(zoo(name))
    plan = float32(make_plan(zoo(name) / "ckpt", "fp8-per-channel", ("megatron",)))
    driven = Driven(plan, tokens_of(expected["ids"]), tmp_path)
    assert distance(driven.streams.logits[0].view(expected["logits"].shape), expected["logits"]) < CLOSE


@pytest.mark.parametrize("name", MAMBA)
@pytest.mark.parametrize("recipe", ["fp8-per-channel", "fp8-blockwise"])
def test_mamba_layers_are_quantized_without_data(zoo, name, recipe, tmp_path):
    document = run(make_plan(zoo(name) / "ckpt", recipe), tmp_path / "out", Options(device="cpu"))
    assert document["fidelity"] is None
    assert any("mamba-ssm" in note for note in document["warnings"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    mixer = found["backbone.layers.0.mixer.out_proj.weight"]
    assert mixer.dtype == torch.float8_e4m3fn
    assert found["backbone.layers.0.mixer.conv1d.weight"].dtype == torch.bfloat16


def test_mamba_layers_are_not_calibrated(zoo, tokens, tmp_path):
    from mptq.errors import UnsupportedModelError

    options = Options(device="cpu", data=DataOptions((str(tokens),), calib_size=2, eval_size=0, seq_length=16))
    with pytest.raises(UnsupportedModelError, match="mamba-ssm"):
        run(make_plan(zoo("nemotron-h") / "ckpt", "fp8"), tmp_path / "out", options)


def test_gemma_needs_its_gate_in_the_config(zoo):
    from mptq.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"linear_fc1.weight has shape \[2, 768, 256\]"):
        open_source(zoo(GEMMA) / "ckpt")


LAYOUTS = {
    "tp2": ("qwen2", {"tp": 2}),
    "pp2": ("qwen2", {"pp": 2}),
    "per-layer": ("qwen2", {"per_layer": True}),
    "latent-tp2": ("deepseek-v3-mtp", {"tp": 2}),  # three layers cannot be split into two stages, and have a key each anyway
}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_do_not_depend_on_how_the_checkpoint_was_saved(zoo, name, layout, tmp_path):
    for folder, made in (("one", zoo(name)), ("other", zoo(name, **layout))):
        run(make_plan(made / "ckpt", "fp8-per-channel"), tmp_path / folder, CONVERT)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor.view(torch.uint8), other[key].view(torch.uint8)) for key, tensor in one.items())


def test_multi_token_prediction_layers_are_copied_only_to_the_megatron_output(zoo, tmp_path):
    plan = make_plan(zoo("deepseek-v3-mtp") / "ckpt", "fp8-per-channel", ("hf", "megatron"))
    carried = {spec.name: spec.dtype for spec in plan.layouts["megatron"].specs if spec.name.startswith("mtp.")}
    assert set(carried.values()) <= {"bfloat16", "float32"}
    assert len(carried) > 10
    assert not [spec.name for spec in plan.layouts["hf"].specs if "mtp" in spec.name]
    document = run(plan, tmp_path / "out", CONVERT)
    assert any("multi-token prediction" in note for note in document["warnings"])


def test_tensors_that_an_output_omits_take_no_bytes_in_it(zoo):
    plan = make_plan(zoo("deepseek-v3-mtp") / "ckpt", "none")
    table = components(plan)
    assert table["multi-token prediction"]["hf"] == 0
    assert {tuple(row) for row in table.values()} == {("parameters", "in", "hf")}


def test_engines_that_choose_other_groups_of_experts_are_a_warning(zoo):
    """DeepSeek-V2's class scores a group by its best expert, megatron-core by topk / group_topk experts."""
    checkpoint = zoo("deepseek-v2-lite") / "ckpt"
    assert not [note for note in warnings(make_plan(checkpoint, "none")) if "groups" in note]
    groups = ("moe_router_num_groups=4", "moe_router_group_topk=1")
    plan = make_plan(checkpoint, "none", options=SourceOptions(config=groups))
    assert family_of(plan.model).name == "DeepSeek-V2"
    (note,) = [note for note in warnings(plan) if "groups" in note]
    assert "by the best expert of each" in note
    assert config_fields(plan.model, family_of(plan.model))["topk_method"] == "group_limited_greedy"


def test_omitted_multi_token_prediction_layers_are_listed(zoo, tmp_path):
    checkpoint = zoo("deepseek-v3-mtp") / "ckpt"
    document = run(make_plan(checkpoint, "fp8-per-channel"), tmp_path / "out", CONVERT)
    assert [key for key, reason in document["dropped"].items() if "multi-token prediction" in reason and "mtp." in key]
    assert verify(tmp_path / "out", against=checkpoint).failures == []


def test_a_fixed_epsilon_of_latents_is_a_warning(zoo, tmp_path):
    """transformers' DeepSeek has a constant epsilon, which the models of the zoo use too."""
    checkpoint = zoo("deepseek-v3") / "ckpt"
    assert not [note for note in warnings(make_plan(checkpoint, "none")) if "epsilon" in note]
    other = make_plan(checkpoint, "none", options=SourceOptions(config=("layernorm_epsilon=1e-3",)))
    assert [note for note in warnings(other) if "normalizes latents with epsilon 1e-06" in note]
    run(other, tmp_path / "out", CONVERT)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert attention.kv_a_layernorm.variance_epsilon == 1e-6
    assert model.model.norm.variance_epsilon == 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_family_is_found_from_the_arguments(zoo, name):
    family = family_of(open_source(zoo(name) / "ckpt").model)
    assert family is not None
    assert family.architecture == CLASSES.get(ZOO[name].hf, ZOO[name].hf)
