"""An output generates with transformers, and stops at the end token of any of the sources."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.plan.plan import SourceOptions
from tests.conftest import read_json
from tests.integration.test_layouts import bridge

CONVERT = Options(device="cpu", data=DataOptions((), eval_size=0))
PROMPT = torch.tensor([[5, 17, 3]])
LONGEST = 24
NO_END = "token ids: no eos_token_id is known, so engines generate up to the limit"


def generated(folder):
    """The ids that the model at `folder` generates after PROMPT, with its own configs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        return model.generate(PROMPT, max_new_tokens=LONGEST, do_sample=False)[0, PROMPT.shape[1] :].tolist()


@pytest.fixture(scope="module")
def endless(aligned_hf, tmp_path_factory):
    """The ids that the model generates without an end token."""
    folder = shutil.copytree(aligned_hf, tmp_path_factory.mktemp("endless") / "hf")
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"eos_token_id": None}))
    ids = generated(folder)
    assert len(ids) == LONGEST
    return ids


@pytest.fixture(scope="module")
def stop(endless):
    """Index of the first token after a few that did not occur before: generation stops there if it is the end token."""
    return next(place for place in range(3, LONGEST) if endless[place] not in endless[:place])


def tokenizer_of(folder, eos):
    """A tokenizer of the model's words, with `eos` as the end token."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(500)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="w1").save_pretrained(folder)
    return folder


def beside_the_tokenizer(_aligned, _hf, end, folder):
    tokenizer_of(folder, "w2")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 2], "temperature": 0.6}))
    return {"tokenizer": folder}


def in_the_run_config(aligned, _hf, end, folder):
    config = {"_target_": "transformers.GenerationConfig.from_dict", "_call_": True, "config_dict": {"eos_token_id": end}}
    return {"checkpoint": bridge(aligned, folder, generation_config=config)}


def in_a_hugging_face_config(_aligned, hf, end, folder):
    shutil.copytree(hf, folder)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"eos_token_id": end}))
    return {"hf_config": folder}


def in_the_tokenizer(_aligned, _hf, end, folder):
    return {"tokenizer": tokenizer_of(folder, f"w{end}")}


@pytest.mark.parametrize("source", [beside_the_tokenizer, in_the_run_config, in_a_hugging_face_config, in_the_tokenizer])
def test_generation_stops_at_the_end_token_of_each_source(aligned, aligned_hf, endless, stop, source, tmp_path):
    end = endless[stop]
    given = source(aligned, aligned_hf, end, tmp_path / "given")
    plan = make_plan(given.get("checkpoint", aligned), "none", ("hf",), SourceOptions(hf_config=given.get("hf_config")))
    options = Options(device="cpu", data=CONVERT.data, tokenizer=given.get("tokenizer"))
    report = run(plan, tmp_path / "out", options)
    assert generated(tmp_path / "out") == endless[: stop + 1]
    ends = [end, 2] if source is beside_the_tokenizer else end
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == ends
    told = read_json(tmp_path / "out" / "generation_config.json")
    assert told["eos_token_id"] == ends
    assert (told.get("temperature"), told.get("bos_token_id")) == {
        beside_the_tokenizer: (0.6, 1),
        in_the_tokenizer: (None, 1),
    }.get(source, (None, read_json(tmp_path / "out" / "config.json")["bos_token_id"]))
    assert not [warning for warning in report["warnings"] if warning.startswith("token ids")]


def test_sources_that_disagree_are_one_warning(aligned, tmp_path):
    tokenizer = tokenizer_of(tmp_path / "tokenizer", "w9")
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": 7, "pad_token_id": 500}')
    options = Options(device="cpu", data=CONVERT.data, tokenizer=tokenizer)
    report = run(make_plan(aligned, "none"), tmp_path / "out", options)
    (warning,) = [warning for warning in report["warnings"] if warning.startswith("token ids")]
    beside = tokenizer / "generation_config.json"
    assert warning == (
        f"token ids: eos_token_id: {beside} has 7, the tokenizer {tokenizer} has 9: using {beside}; "
        f"{beside} has pad_token_id 500, which is ignored: the vocabulary has 500 tokens"
    )
    config = read_json(tmp_path / "out" / "config.json")
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, 7, None]
    assert read_json(tmp_path / "out" / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 7}


def test_without_any_source_there_is_a_warning(aligned, endless, tmp_path):
    report = run(make_plan(aligned, "none"), tmp_path / "out", CONVERT)
    assert any(warning.startswith(NO_END) for warning in report["warnings"])
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert generated(tmp_path / "out") == endless
    report = run(make_plan(aligned, "fp8-blockwise", ("megatron",)), tmp_path / "megatron", CONVERT)
    assert not any(warning.startswith(NO_END) for warning in report["warnings"])
