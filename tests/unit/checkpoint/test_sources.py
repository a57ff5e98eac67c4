import sys

import pytest

from mptq.checkpoint.locate import Location
from mptq.checkpoint.sources import load_yaml, run_config
from mptq.errors import CheckpointError

# Every PyYAML tag that creates or calls Python objects.
HOSTILE = """
_target_: os.system
model:
  name: !!python/name:os.system ''
  module: !!python/module:antigravity ''
  call: !!python/object/apply:os.system ["touch {touched}"]
  new: !!python/object/new:subprocess.Popen [["touch", "{touched}"]]
  object: !!python/object:collections.Counter {{a: 1}}
  pair: !!python/tuple [1, 2]
  other: !Unknown {{b: [2]}}
  word: !word text
  _call_: true
"""


def test_nothing_is_imported_or_run(tmp_path):
    file = tmp_path / "run_config.yaml"
    file.write_text(HOSTILE.format(touched=tmp_path / "touched"))
    assert load_yaml(file) == {
        "_target_": "os.system",
        "model": {
            "name": {"_target_": "os.system"},
            "module": {"_target_": "antigravity"},
            "call": {"_target_": "os.system"},
            "new": {"_target_": "subprocess.Popen"},
            "object": {"_target_": "collections.Counter", "a": 1},
            "pair": [1, 2],
            "other": {"b": [2]},
            "word": "text",
            "_call_": True,
        },
    }
    assert not (tmp_path / "touched").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "",
        "1: one",
        "a: [",
        "a: *b",
        "a: !!int ''",
        "a: !!bool maybe",
        "a: !!timestamp then",
        "a: !!float {}",
        "a: 2026-13-40",
        "a: &a !x {b: *a}",
        "? {a: 1}\n: 2",
        "a: {<<: {b: 1}}",
        "a: " + "[" * 5000 + "]" * 5000,
        "a: \x00",
        "a: 1\n---\nb: 2",
        f"a: {'9' * 10_000}",
    ],
)
def test_an_invalid_run_config_is_a_one_line_error(tmp_path, text):
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"run_config\.yaml") as found:
        load_yaml(tmp_path / "run_config.yaml")
    assert "\n" not in str(found.value)


def test_binary_and_oversized_run_configs(tmp_path):
    file = tmp_path / "run_config.yaml"
    file.write_bytes(b"a: \xff\xfe")
    with pytest.raises(CheckpointError, match="is not a readable YAML file"):
        load_yaml(file)
    with file.open("wb") as opened:
        opened.truncate((16 << 20) + 1)
    with pytest.raises(CheckpointError, match="too large for a run config"):
        load_yaml(file)


def located(file, framework):
    return Location(file.parent, file.parent, 1, file, framework)


def test_bridge_saves_its_tokenizer_with_the_weights(tmp_path):
    file = tmp_path / "run_config.yaml"
    file.write_text("model: {num_layers: 2}\ntokenizer: {tokenizer_model: org/name, tokenizer_type: HuggingFaceTokenizer}\n")
    document, source = run_config(located(file, "Megatron-Bridge"))
    assert document["tokenizer"]["tokenizer_model"] == "org/name"
    assert source == "run_config.yaml"
    (tmp_path / "tokenizer").mkdir()
    document, _ = run_config(located(file, "Megatron-Bridge"))
    assert document["tokenizer"] == {"tokenizer_model": str(tmp_path / "tokenizer"), "tokenizer_type": "HuggingFaceTokenizer"}


def test_nemos_model_is_the_document(tmp_path):
    file = tmp_path / "context" / "model.yaml"
    file.parent.mkdir()
    target = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
    file.write_text(f"config: {{num_layers: 2}}\ntokenizer: {{_target_: {target}, pretrained_model_name: org/name}}\n")
    document, source = run_config(located(file, "NeMo 2"))
    assert (source, document["model"]["config"]) == ("context/model.yaml", {"num_layers": 2})
    assert document["tokenizer"] == {"tokenizer_model": "org/name", "tokenizer_type": "AutoTokenizer"}
    (tmp_path / "context" / "nemo_tokenizer").mkdir()
    document, _ = run_config(located(file, "NeMo 2"))
    assert document["tokenizer"]["tokenizer_model"] == str(tmp_path / "context" / "nemo_tokenizer")


def test_no_run_config(tmp_path):
    assert run_config(Location(tmp_path, tmp_path, 1)) == ({}, "no run config")
