import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from mptq.errors import CheckpointError, OutputError
from mptq.files import sha256
from mptq.formats import FORMATS
from mptq.verification.structure import verify


@pytest.fixture
def out(quantized, tmp_path):
    """A copy of an output to damage."""
    return shutil.copytree(quantized["aligned", "fp8-blockwise"], tmp_path / "out")


def resign(out, *names):
    """Write the hashes of changed files into the manifest, as a forger could."""
    manifest = json.loads((out / "manifest.json").read_text())
    for name in names:
        manifest["files"][name] = {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)}
    (out / "manifest.json").write_text(json.dumps(manifest))


def edit_hf(out, change):
    """Change the tensors of the Hugging Face output and update the file's hash."""
    path = out / "hf" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    resign(out, "hf/model.safetensors")


@pytest.mark.parametrize("model", ["aligned", "crossing"])
@pytest.mark.parametrize("recipe", ["fp8-blockwise", "fp8-blockwise-ue8m0", "fp8-per-channel", "fp8-per-tensor"])
def test_outputs_verify_against_the_source(quantized, model, recipe, request):
    found = verify(quantized[model, recipe], request.getfixturevalue(model))
    assert found.failures == []
    layers = 4 if model == "aligned" else 2
    assert found.compared == 2 * (6 * layers + (3 if model == "aligned" else 2))
    assert found.files > 8
    assert found.document["ok"]


def test_flipped_bit(out):
    path = out / "hf" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert verify(out).failures == ["hf/model.safetensors has changed: its SHA-256 does not match the manifest"]


def test_missing_and_short_files(out):
    (out / "hf" / "config.json").unlink()
    shard = out / "megatron" / "iter_0000100" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    first, second = verify(out).failures
    assert first == "hf/config.json is missing"
    assert second.startswith("megatron/iter_0000100/__1_0.distcp has ")


def test_a_wrong_number_is_detected_only_against_the_source(out, aligned):
    name = "model.layers.2.mlp.down_proj.weight"

    def change(tensors):
        tensors[name].view(dtype=__import__("torch").uint8)[5, 6] ^= 8

    edit_hf(out, change)
    assert verify(out).failures == []
    assert verify(out, aligned).failures == [f"{name}: element [5, 6] differs from the source by more than E4M3 rounding error"]


def test_wrong_scale(out, aligned):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_hf(out, lambda tensors: tensors[name + "_scale_inv"].mul_(1.0000002))
    assert verify(out, aligned).failures == [f"{name}: scales differ from amax / 448 of the source"]


def test_a_changed_copy_is_detected(out, aligned):
    edit_hf(out, lambda tensors: tensors["model.norm.weight"].mul_(2))
    message = "model.norm.weight differs from decoder.final_layernorm.weight of the source"
    assert verify(out, aligned).failures == [message]


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-23, float("nan"), float("inf")])
def test_impossible_scales_are_detected(out, value):
    name = "model.layers.1.self_attn.k_proj.weight_scale_inv"
    edit_hf(out, lambda tensors: tensors[name].fill_(value))
    assert verify(out).failures == [f"{name} has scales that are not finite or are below 1.8e-12"]


def test_names_and_shapes(out):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
        tensors["surprise"] = tensors["model.norm.weight"].clone()
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"][:128].clone()

    edit_hf(out, change)
    failures = verify(out).failures
    assert "model.layers.0.mlp.up_proj.weight_scale_inv is missing from the hf output" in failures
    assert "surprise is in the hf output but not in the manifest" in failures
    assert any(line.startswith("model.layers.0.mlp.down_proj.weight is float8_e4m3fn [128, 384], not") for line in failures)


def test_exclude_list(out):
    path = out / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = []
    path.write_text(json.dumps(config))
    resign(out, "hf/config.json")
    assert verify(out).failures == ["config.json has missing or extra excluded modules ['lm_head']: engines would misread them"]


def test_unaccounted_source_tensor(out, aligned):
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["dropped"]["common_state/shard_0_1"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    message = "common_state/shard_0_1 of the source is neither in the output nor listed as dropped"
    assert verify(out, aligned).failures == [message]


def test_other_source(out, crossing):
    with pytest.raises(CheckpointError, match="is not the checkpoint that this output was made from"):
        verify(out, crossing)


def test_no_output(tmp_path):
    with pytest.raises(OutputError, match=r"has no manifest\.json"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match="is damaged"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 99}')
    with pytest.raises(OutputError, match="does not have schema version 3"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 3, "recipe": {}}')
    with pytest.raises(OutputError, match="recipe.name: Field required"):
        verify(tmp_path)


def test_a_manifest_that_omits_a_tensor_is_detected(out, aligned):
    """A manifest that omits a tensor of the source, with matching files, is not accepted as complete."""
    manifest = json.loads((out / "manifest.json").read_text())
    gone = manifest["tensors"].pop("decoder.final_layernorm.weight")
    (out / "manifest.json").write_text(json.dumps(manifest))
    edit_hf(out, lambda tensors: tensors.pop(gone["hf"][0]["name"]))
    lines = verify(out, aligned).failures
    assert any("decoder.final_layernorm.weight" in line for line in lines)


def test_an_amax_that_does_not_match_its_scale_is_detected(out, monkeypatch):
    """ModelOpt uses either."""
    name = "decoder.layers.1.mlp.linear_fc2.weight_quantizer._amax"
    opened = FORMATS["megatron"].open

    def changed(directory):
        found = opened(directory)
        return replace(found, load=lambda key: found.load(key) * (2 if key == name else 1))

    monkeypatch.setattr(FORMATS["megatron"], "open", changed)
    scale = name.removesuffix("_amax") + "_scale"
    assert [line.partition(":")[0] for line in verify(out).failures] == [f"{name} is not 448 times {scale}"]
