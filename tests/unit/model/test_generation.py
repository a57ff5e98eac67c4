"""Token ids for generation: which source is used, and warnings about the others."""

import json

import pytest

from mptq.errors import CheckpointError
from mptq.model.generation import GenerationSource, resolve
from mptq.model.settings.from_hf_config import generation_sources
from mptq.model.settings.from_run_config import generation_fields

NO_END = "no eos_token_id is known, so engines generate up to the limit: pass a --tokenizer or --hf-config that has it"


def resolved(*sources, vocabulary=100):
    return resolve([GenerationSource(name, fields, whole) for name, fields, whole in sources], vocabulary)


def warning(*sources):
    """Returns the text of the only warning."""
    (text,) = resolved(*sources).warnings
    assert text.startswith("token ids: ")
    return text.removeprefix("token ids: ")


def test_each_id_comes_from_the_first_source_that_has_it():
    found = resolved(
        ("a", {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": None}, True),
        ("b", {"eos_token_id": 3, "bos_token_id": 1, "top_k": 5}, True),
        ("c", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, False),
    )
    assert found.ids == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    assert found.fields == found.ids | {"temperature": 0.6}
    assert found.warnings == ()


def test_a_list_of_one_is_an_id():
    assert resolved(("a", {"eos_token_id": [2]}, False)).fields == {"eos_token_id": 2}


def test_sources_that_disagree_are_one_warning():
    first = ("a", {"eos_token_id": 2, "bos_token_id": 1}, True)
    assert warning(first, ("b", {"eos_token_id": 3}, False)) == "eos_token_id: a has 2, b has 3: using a"
    assert warning(first, ("b", {"eos_token_id": [2, 3], "bos_token_id": 4}, False)) == (
        "bos_token_id: a has 1, b has 4: using a; eos_token_id: a has 2, b has [2, 3]: using a"
    )


def test_no_eos_token_is_a_warning():
    assert warning() == NO_END
    assert warning(("a", {"eos_token_id": None, "bos_token_id": 1}, True)) == NO_END
    assert warning(("a", {"eos_token_id": []}, True)) == NO_END
    assert resolved().fields == {}


def test_ids_that_the_model_does_not_have_are_ignored_with_a_warning():
    other, own = ("a", {"eos_token_id": 100}, True), ("b", {"eos_token_id": 99}, False)
    assert warning(other, own) == "a has eos_token_id 100, which is ignored: the vocabulary has 100 tokens"
    assert resolved(other, own).ids == {"eos_token_id": 99}
    assert resolved(other, own).fields == {"eos_token_id": 99}
    assert warning(("a", {"eos_token_id": [1, 100]}, True)) == (
        f"a has eos_token_id [1, 100], which is ignored: the vocabulary has 100 tokens; {NO_END}"
    )


@pytest.mark.parametrize("value", ["2", True, 2.0, -5, {"id": 2}, [2, "3"], [[2]], [-1]])
def test_values_that_are_not_ids_are_ignored_with_a_warning(value):
    assert warning(("a", {"eos_token_id": value}, True)) == (
        f"a has eos_token_id {value!r}, which is not a token id and is ignored; {NO_END}"
    )
    assert warning(("a", {"eos_token_id": 2, "pad_token_id": [2]}, True)) == (
        "a has pad_token_id [2], which is not a token id and is ignored"
    )


def test_minus_one_means_no_padding_token():
    found = resolved(("a", {"eos_token_id": 2, "pad_token_id": -1}, True), ("b", {"pad_token_id": 0}, False))
    assert (found.ids, found.warnings) == ({"eos_token_id": 2, "pad_token_id": 0}, ())


BRIDGE = {
    "_target_": "transformers.generation.configuration_utils.GenerationConfig.from_dict",
    "_call_": True,
    "config_dict": {"eos_token_id": [7, 8], "bos_token_id": 1, "_from_model_config": False, "do_sample": True},
}
NEMO = {"_target_": "transformers.generation.configuration_utils.GenerationConfig", "eos_token_id": 7}


def test_a_run_config_can_have_a_generation_config():
    told = {"eos_token_id": [7, 8], "bos_token_id": 1, "do_sample": True}
    assert generation_fields({"model": {"num_layers": 2, "generation_config": BRIDGE}}) == told
    assert generation_fields({"model": {"config": {"generation_config": NEMO}}}) == {"eos_token_id": 7}


@pytest.mark.parametrize("model", [None, [], {}, {"generation_config": None}, {"generation_config": {"config_dict": [1]}}])
def test_a_run_config_without_a_generation_config(model):
    assert generation_fields({"model": model}) == {}


def test_a_hugging_face_directory(tmp_path):
    config = {"model_type": "x", "eos_token_id": 3, "text_config": {"eos_token_id": 4, "bos_token_id": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (alone,) = generation_sources(tmp_path)
    assert alone == GenerationSource(str(tmp_path / "config.json"), {"eos_token_id": 4, "bos_token_id": 1})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4], "top_k": 5}')
    beside, same = generation_sources(tmp_path / "config.json")
    assert same == alone
    assert beside == GenerationSource(
        str(tmp_path / "generation_config.json"), {"eos_token_id": [3, 4], "top_k": 5}, whole=True
    )
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json is not valid JSON"):
        generation_sources(tmp_path)
