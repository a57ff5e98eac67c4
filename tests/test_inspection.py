import pytest

from mptq.errors import CheckpointError
from mptq.inspection import inspect


def test_checkpoint(aligned):
    (document,) = inspect(aligned)
    facts = document["facts"]
    assert document["kind"] == "Megatron checkpoint"
    assert facts["iteration"] == 100
    assert facts["layout"] == "layers stacked"
    assert facts["architecture"].startswith("Llama-like, 4 layers, hidden 256, ffn 384, 4 heads in 2 groups of 128")
    assert "vocabulary 500 (stored 512), untied" in facts["architecture"]
    assert facts["source"] == "args in common_state"
    assert facts["saved at"] == "TP=1 PP=1"
    linears = 4 * (1024 * 256 + 256 * 512 + 3 * 384 * 256)
    assert document["parameters"] == linears + 2 * 512 * 256 + 9 * 256
    assert document["bytes"] == 2 * document["parameters"]
    rows = {row["component"]: row for row in document["components"]}
    assert rows["embedding"] == {
        "component": "embedding",
        "parameters": 512 * 256,
        "bytes": 512 * 512,
        "dtypes": ["bfloat16"],
    }


def test_both_outputs(quantized):
    hf, megatron = inspect(quantized["aligned", "fp8-blockwise"])
    assert hf["kind"] == "Hugging Face model"
    assert hf["facts"]["quantization"] == "fp8"
    assert hf["facts"]["written by"].endswith("recipe fp8-blockwise")
    assert megatron["facts"]["layout"] == "one key per layer, quantized by ModelOpt"
    rows = {row["component"]: row for row in megatron["components"]}
    assert rows["mlp"]["dtypes"] == ["float8_e4m3fn"]
    assert rows["scales"]["parameters"] == 0
    assert megatron["parameters"] == hf["parameters"] + 2 * 12 * 256  # the vocabulary's padding


def test_model_of_others(aligned_hf):
    (document,) = inspect(aligned_hf)
    assert document["facts"]["quantization"] == "none"
    assert "written by" not in document["facts"]


def test_config_of_another_form(aligned_hf, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(aligned_hf / "model.safetensors")
    for text in ("[1]", '{"quantization_config": [1]}', '{"quantization_config": {"ignore": null}}'):
        (tmp_path / "config.json").write_text(text)
        assert inspect(tmp_path)[0]["facts"]["quantization"] == "none"


def test_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="has no .metadata"):
        inspect(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        inspect(tmp_path)
