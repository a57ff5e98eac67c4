import io
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mptq import make_plan
from mptq.checkpoint.index import open_checkpoint
from mptq.cli.console import show
from mptq.cli.inspection_tables import inspection
from mptq.errors import CheckpointError, RecipeError, UnsupportedModelError
from mptq.inspection import inspect
from mptq.inspection.megatron import describe_megatron
from mptq.inspection.quantized import scales
from mptq.inspection.settings import settings_document
from mptq.inspection.tree import component, stacking, tree
from mptq.model.settings.resolve import resolve
from mptq.model.settings.settings import SettingsSource, merge
from mptq.plan.estimates import peak_memory
from mptq.recipes.recipe import recipe_names
from mptq.types import TensorSpec
from tests.conftest import mptq


def rows_of(document):
    return {row["component"]: row for row in document["components"]}


def test_checkpoint(aligned):
    (document,) = inspect(aligned)
    facts = document["facts"]
    assert document["kind"] == "Megatron checkpoint"
    assert document["warnings"] == []
    assert facts["iteration"] == 100
    assert facts["layout"] == "layers stacked"
    assert facts["architecture"].startswith("Llama-like, 4 layers, hidden 256, ffn 384, 4 heads in 2 groups of 128")
    assert "vocabulary 500 (stored 512), untied" in facts["architecture"]
    assert facts["Hugging Face"] == "LlamaForCausalLM (Llama)"
    assert facts["source"] == "args in common_state"
    assert facts["saved at"] == "TP=1 PP=1"
    assert document["parallel"]["TP"] == document["parallel"]["CP"] == 1
    linears = 4 * (1024 * 256 + 256 * 512 + 3 * 384 * 256)
    assert document["parameters"] == linears + 2 * 512 * 256 + 9 * 256
    assert document["bytes"] == 2 * document["parameters"]


def test_tree(aligned):
    rows = rows_of(inspect(aligned)[0])
    assert set(rows) == {"embedding", "norms", "attention", "mlp", "output layer"}
    embedding = {key: value for key, value in rows["embedding"].items() if key != "tensors"}
    assert embedding == {
        "component": "embedding",
        "parameters": 512 * 256,
        "bytes": 512 * 512,
        "dtypes": ["bfloat16"],
        "stacking": "",
    }
    assert rows["mlp"]["stacking"] == "4 layers stacked"
    first = next(leaf for leaf in rows["mlp"]["tensors"] if "fc1" in leaf["name"])
    assert (first["count"], first["shape"], first["parameters"]) == (1, [4, 768, 256], 4 * 768 * 256)


def test_experts(mixtral):
    rows = rows_of(inspect(mixtral)[0])
    assert rows["experts"]["stacking"] == "2 layers stacked, 4 experts stacked"
    assert rows["router"]["parameters"] == 2 * 4 * 256


@pytest.mark.parametrize("model", ["aligned", "mixtral", "crossing"])
def test_predictions_equal_the_plans(model, request):
    """The sums by kind of layer equal the sums over all tensors of the outputs, and refusals are the plan's."""
    path = request.getfixturevalue(model)
    rows = inspect(path)[0]["recipes"]
    assert [row["recipe"] for row in rows] == recipe_names()
    for row in rows:
        peaks = []
        for form in ("hf", "megatron"):
            if form in row["problems"]:
                assert form not in row["bytes"]
                with pytest.raises(RecipeError, match=re.escape(row["problems"][form])):
                    make_plan(path, row["recipe"], (form,))
                continue
            plan = make_plan(path, row["recipe"], (form,))
            assert row["bytes"][form] == plan.layouts[form].nbytes
            peaks.append(peak_memory(plan))
        assert row["peak_bytes"] == max(peaks)


@pytest.mark.parametrize("name", ["deepseek-v3-mtp", "moe-freq-list", "nemotron-h", "gpt"])
def test_every_architecture(zoo, name):
    """Models with several kinds of layers, multi-token prediction, and models that no Hugging Face architecture covers."""
    path = zoo(name) / "ckpt"
    document = inspect(path)[0]
    assert document["problem"] is None
    assert document["warnings"] == []
    assert rows_of(document).get("other") is None
    assert (name == "deepseek-v3-mtp") == ("multi-token prediction" in rows_of(document))
    for row in document["recipes"]:
        for form, found in row["bytes"].items():
            assert found == make_plan(path, row["recipe"], (form,)).layouts[form].nbytes
        if document["architecture"]["family"] is None and row["recipe"] != "none":
            with pytest.raises(UnsupportedModelError) as error:
                make_plan(path, row["recipe"], ("hf",))
            assert row["problems"]["hf"] == str(error.value)
            assert "differs in" in document["facts"]["Hugging Face"]


def test_settings(aligned):
    found = {row["key"]: row for row in inspect(aligned)[0]["settings"]}
    assert found["hidden_size"] == {"key": "hidden_size", "value": 256, "source": "args in common_state", "matters": True}
    assert found["add_bias_linear"]["matters"]  # it is off, while megatron-core's default is on
    assert not found["mamba_state_dim"]["matters"]
    assert not found["moe_router_topk"]["matters"]
    assert not found["yarn_beta_fast"]["matters"]


def test_conflicts():
    rungs = [SettingsSource("one", {"hidden_size": 8, "num_layers": 2}), SettingsSource("two", {"hidden_size": 16})]
    found = settings_document(merge(rungs))
    (conflict,) = found["conflicts"]
    assert conflict["text"] == "hidden_size: one has 8, two has 16: using one"
    assert (conflict["kept"], conflict["other"], conflict["other_source"]) == (8, 16, "two")
    defaults = {row["key"] for row in found["settings"] if row["source"] == "megatron-core's default"}
    assert {"normalization", "activation_func", "rotary_base"} <= defaults


def test_training_state(aligned):
    checkpoint = open_checkpoint(aligned)
    weight = checkpoint.tensors["output_layer.weight"]
    name = "optimizer.state.exp_avg.output_layer.weight"
    moment = weight._replace(spec=TensorSpec(name, "float32", weight.spec.shape))
    args = {**checkpoint.args, "consumed_train_samples": 30, "seq_length": 7}
    document = describe_megatron(replace(checkpoint, tensors={**checkpoint.tensors, name: moment}, args=args))
    stored = sum(chunk.record.length for chunk in weight.chunks)
    assert {"what": "optimizer state", "items": 1, "bytes": stored} in document["not_read"]
    assert document["tokens_seen"] == 210
    assert document["facts"]["tokens seen"] == "210"
    assert document["parameters"] == inspect(aligned)[0]["parameters"]
    del args["consumed_train_samples"]
    assert describe_megatron(replace(checkpoint, args=args))["tokens_seen"] is None


def test_unsupported(aligned):
    checkpoint = open_checkpoint(aligned)
    document = describe_megatron(replace(checkpoint, args={**checkpoint.args, "attention_output_gate": True}))
    assert document["recipes"] == []
    assert "attention output gate" in document["problem"]
    assert document["facts"]["architecture"] == "not supported"
    assert document["parameters"] > 0
    assert resolve(checkpoint)["hidden_size"] == 256
    fewer = {name: tensor for name, tensor in checkpoint.tensors.items() if "linear_proj" not in name}
    document = describe_megatron(replace(checkpoint, tensors=fewer))
    assert document["architecture"]["family"] == "Llama"
    assert "linear_proj.weight is not in the checkpoint" in document["problem"]


@pytest.mark.parametrize("wrong", [None, "four", -1, True, 10**5000, [1]], ids=range(6))
def test_arguments_that_are_not_counts_are_unknown(aligned, wrong):
    checkpoint = open_checkpoint(aligned)
    names = ("tensor_model_parallel_size", "consumed_train_samples", "data_parallel_size")
    document = describe_megatron(replace(checkpoint, args={**checkpoint.args, **dict.fromkeys(names, wrong)}))
    assert document["facts"]["saved at"] == "TP=? PP=1"
    assert document["tokens_seen"] is document["parallel"]["DP"] is None


def test_a_checkpoint_without_arguments(aligned):
    document = describe_megatron(replace(open_checkpoint(aligned), args={}, args_source="nowhere"))
    assert "not supported" in document["facts"]["architecture"]
    assert document["facts"]["saved at"] == "TP=? PP=?"
    assert {row["source"] for row in document["settings"]} == {"the tensors' shapes", "megatron-core's default"}


def test_both_outputs(quantized):
    hf, megatron = inspect(quantized["aligned", "fp8-blockwise"])
    assert hf["kind"] == "Hugging Face model"
    assert hf["facts"]["quantization"] == "fp8"
    assert hf["facts"]["written by"].endswith("recipe fp8-blockwise")
    assert megatron["facts"]["layout"] == "one key per layer, quantized by ModelOpt"
    rows = rows_of(megatron)
    assert rows["mlp"]["dtypes"] == ["float8_e4m3fn"]
    assert rows["scales"]["parameters"] == 0
    assert megatron["parameters"] == hf["parameters"] + 2 * 12 * 256  # the vocabulary's padding
    assert megatron["problem"].startswith("it is quantized already")
    words = "float8_e4m3fn, blocks of 128x128, float32 scales"
    assert megatron["quantization"] == {"weights": {words: 4 * 4}, "static_inputs": 0, "cache_scales": 0}
    assert hf["quantization"]["weights"] == {words: 4 * 7}


def test_metrics_of_an_output(quantized):
    root = quantized["crossing", "fp8"]
    for document in inspect(root):
        made = document["output"]
        report = json.loads((root / "report.json").read_text())
        assert made["fidelity"] == report["fidelity"]
        assert made["relative_error"] == report["relative_error"]
        assert made["files"] == json.loads((root / "manifest.json").read_text())["files"]
        found = document["quantization"]
        assert set(found["weights"]) == {"float8_e4m3fn, one scale a tensor"}
        assert found["static_inputs"] == sum(found["weights"].values())
        assert found["cache_scales"] == 2 * 2


@pytest.mark.parametrize(
    ("weight", "scale", "words"),
    [
        (("x.weight", "float8_e4m3fn", (256, 100)), ("x.weight_scale", "float32", (256, 1)), "one scale a row (float32)"),
        (("x.weight", "float8_e4m3fn", (256, 100)), ("x.weight_scale", "float32", (256,)), "one scale a row (float32)"),
        (("x.weight", "float8_e4m3fn", (8, 64)), ("x.weight_scale", "uint8", (8, 2)), "blocks of 1x32, E8M0 scales"),
        (("x.weight", "float8_e4m3fn", (300, 200)), ("x.weight_scale_inv", "float32", (3, 2)), "blocks of 128x128, float32"),
        (("x.weight", "bfloat16", (8, 64)), ("x.weight_quantizer._amax", "float32", ()), "simulated, one scale a tensor"),
        (("y.weight", "bfloat16", (8, 64)), ("x.weight_scale", "float32", ()), "scales without a weight"),
    ],
)
def test_scales(weight, scale, words):
    (found,) = scales([TensorSpec(*weight), TensorSpec(*scale)])["weights"]
    assert words in found


def test_no_scales():
    assert scales([TensorSpec("x.weight", "bfloat16", (8, 64))]) is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("decoder.layers.1.mlp.router.expert_bias", "router"),
        ("model.layers.1.mlp.gate_proj.weight", "mlp"),
        ("model.layers.1.mlp.gate.weight", "router"),
        ("model.layers.1.mlp.shared_expert_gate.weight", "shared experts"),
        ("backbone.layers.3.mixer.q_proj.weight", "attention"),
        ("backbone.layers.3.mixer.up_proj.weight", "mlp"),
        ("backbone.layers.3.mixer.in_proj.weight", "mamba"),
        ("mtp.layers.0.transformer_layer.self_attention.linear_qkv.weight", "multi-token prediction"),
        ("vision_model.decoder.layers.mlp.linear_fc1.weight", "vision"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("lm_head.weight", "output layer"),
    ],
)
def test_component(name, part):
    assert component(name) == part


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 4, 8, 8), "2 layers stacked, 4 experts stacked"),
        ("decoder.layers.1.mlp.experts.experts.linear_fc1.weight", (4, 8, 8), "one key per layer, 4 experts stacked"),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight3", (8, 8), "one key per layer, one key per expert"),
        ("decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight", (8, 8), "one key per layer, one key per expert"),
        ("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", (8, 8), "one key per layer"),
        ("output_layer.weight", (8, 8), ""),
    ],
)
def test_stacking(name, shape, words):
    assert stacking(TensorSpec(name, "bfloat16", shape)) == words


def test_names_that_differ_only_in_numbers_are_one_row():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1.weight" for layer in range(3) for expert in range(4)]
    (row,) = tree(TensorSpec(name, "bfloat16", (8, 8)) for name in names)["components"]
    (leaf,) = row["tensors"]
    assert (leaf["name"], leaf["count"], leaf["parameters"]) == ("model.layers.*.mlp.experts.*.w1.weight", 12, 12 * 64)


def test_printed(aligned, quantized):
    text = mptq("inspect", aligned).stdout
    for part in ("4x768x256", "from args in common_state", "never read", "fp8-per-channel", "hidden_size=256", "peak memory"):
        assert part in text
    text = mptq("inspect", quantized["crossing", "fp8"]).stdout
    for part in ("one scale a tensor", "KL  ", "top-1", "weight error", "KV cache scales", "cannot be quantized"):
        assert part in text


def test_the_reason_for_a_refusal_is_printed_first(aligned, tmp_path):
    root = shutil.copytree(aligned, tmp_path / "copy")
    (root / "iter_0000100" / "modelopt_state").mkdir()
    first, second, *_ = mptq("inspect", root).stdout.splitlines()
    assert first == f"{root}/iter_0000100  Megatron checkpoint"
    assert second == (
        "cannot be quantized: it is quantized already (modelopt_state, or *_quantizer.* tensors): pass the checkpoint that "
        "it was made from"
    )


def test_a_model_of_another_tool(aligned_hf):
    (document,) = inspect(aligned_hf)
    assert document["facts"]["quantization"] == "none"
    assert "written by" not in document["facts"]
    assert document["quantization"] is None
    assert "model.safetensors" in document["files"]


def test_an_fp8_model_of_another_tool(quantized, tmp_path):
    """Without mptq's manifest and report, the quantization is determined from the scales."""
    shutil.copytree(quantized["aligned", "fp8-blockwise"] / "hf", tmp_path / "hf")
    (document,) = inspect(tmp_path / "hf")
    assert "output" not in document
    assert document["quantization"]["weights"] == {"float8_e4m3fn, blocks of 128x128, float32 scales": 28}
    assert document["quantization_config"]["weight_block_size"] == [128, 128]


def test_a_config_of_another_structure(aligned_hf, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(aligned_hf / "model.safetensors")
    for text in ("[1]", '{"quantization_config": [1]}', '{"quantization_config": {"ignore": null}}'):
        (tmp_path / "config.json").write_text(text)
        assert inspect(tmp_path)[0]["facts"]["quantization"] == "none"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
NAMED = st.sampled_from(
    [
        "a.weight",
        "a.weight_scale",
        "a.weight_scale_inv",
        "a.input_scale",
        "a.weight_quantizer._scale",
        "b.weight_quantizer._amax",
        "b.weight",
        "model.layers.0.self_attn.k_scale",
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "[red]",
    ]
)


@given(
    config=VALUES | st.dictionaries(st.sampled_from(["architectures", "hidden_size", "num_hidden_layers"]), VALUES),
    quantization=VALUES | st.dictionaries(st.sampled_from(["quant_method", "ignore", "modules_to_not_convert"]), VALUES),
    shapes=st.dictionaries(NAMED, st.lists(st.integers(0, 4), max_size=3), max_size=5),
)
def test_arbitrary_configs_and_scales_are_described(config, quantization, shapes):
    import numpy as np
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file({name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}, f"{folder}/model.safetensors")
        config = config | {"quantization_config": quantization} if isinstance(config, dict) else config
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (document,) = inspect(Path(folder))
        assert all(str(value).isprintable() for value in document["facts"].values())
        printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
        show(inspection(document), Console(file=printed))
        printed.flush()


@pytest.mark.parametrize(
    ("name", "said"),
    [("config.json", "cannot be read: Is a directory"), ("other.safetensors", "is not a valid safetensors file")],
)
def test_a_directory_instead_of_a_file(aligned_hf, tmp_path, name, said):
    (tmp_path / "model.safetensors").symlink_to(aligned_hf / "model.safetensors")
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=said):
        inspect(tmp_path)


def test_an_empty_directory_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is empty"):
        inspect(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        inspect(tmp_path)


def test_a_config_of_another_tool_with_odd_values(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"lm_head.weight": np.zeros((2, 2), dtype=np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": [1, null], "quantization_config": {"ignore": [{}, 3]}}')
    (document,) = inspect(tmp_path)
    assert document["facts"]["architecture"].startswith("1, None, ")
    assert document["facts"]["excluded"] == "{}, 3"
    (tmp_path / "config.json").write_text('{"architectures": 7, "quantization_config": {"ignore": "lm_head"}}')
    (document,) = inspect(tmp_path)
    assert document["facts"]["excluded"] == ""
