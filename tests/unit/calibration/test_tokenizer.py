"""Documents as token ids."""

import json

import numpy as np
import pytest

from mptq.calibration.datasets.documents import Document
from mptq.calibration.tokenizer import encode, generation_config, load_tokenizer, special_ids, tokenizer_directory
from mptq.errors import DataError
from tests.unit.calibration.conftest import WORDS, ids, make_tokenizer, text

USER, ASSISTANT = WORDS + 1, WORDS + 2


def encoded(tokenizer, content, ended=True):
    found = encode(Document(content, "here"), tokenizer, ended)
    assert found.dtype == np.int64
    return found.tolist()


def test_text_ends_with_eos_where_asked(words):
    tokenizer = load_tokenizer(words)
    assert encoded(tokenizer, text(5, 3)) == [*ids(5, 3), 2]
    assert encoded(tokenizer, text(5, 3), ended=False) == ids(5, 3)
    assert encoded(tokenizer, "w1 </s>") == [4, 2]  # not twice
    assert encoded(tokenizer, " \n") == []
    assert encoded(tokenizer, np.array([9, 2, 9], np.uint16)) == [9, 2, 9]


def test_bos_is_added_as_the_tokenizer_does(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "bos", bos=True, eos=False))
    assert encoded(tokenizer, text(5, 3)) == [1, *ids(5, 3)]


def test_chats_go_through_the_template(chat):
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    assert encoded(load_tokenizer(chat), messages) == [USER, *ids(1, 2), 2, ASSISTANT, *ids(3, 1), 2]


def test_chats_without_a_template(words):
    with pytest.raises(DataError) as failure:
        encoded(load_tokenizer(words), [{"role": "user", "content": "w1"}])
    assert str(failure.value) == "here is a chat, but the tokenizer has no chat template: use a dataset of plain text"


def test_chats_that_the_template_refuses(tmp_path):
    strict = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users first') }}{% endif %}{{ 1 + messages[0]['content'] }}"
    )
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "strict", template=strict))
    for role, said in (("system", "users first"), ("user", "unsupported operand")):
        with pytest.raises(DataError, match=f"here: the tokenizer's chat template rejects these messages: {said}"):
            encoded(tokenizer, [{"role": role, "content": "w1"}])


def test_a_file_of_the_tokenizer_may_be_named(words):
    assert tokenizer_directory(words / "tokenizer.json") == words
    assert encoded(load_tokenizer(words / "tokenizer.json"), "w1") == [4, 2]


BROKEN = {
    "empty": ({}, "cannot be loaded: "),
    "no json": ({"tokenizer.json": "{"}, "cannot be loaded: "),
    "no model": ({"tokenizer.json": {"model": {"type": "X"}}}, "did not match any variant"),
    "no config": ({"tokenizer_config.json": "[1]"}, "cannot be loaded: "),
}
OWN_CODE = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}


def test_code_of_a_tokenizer_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_tokenizer(tmp_path / "own")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | OWN_CODE))
    (folder / "own.py").write_text("import transformers\nclass Own(transformers.PreTrainedTokenizerFast):\n    ran = True\n")
    with pytest.raises(DataError) as failure:
        load_tokenizer(folder)
    assert str(failure.value) == (
        f"tokenizer {folder} needs the Python code in its directory: pass --trust-remote-code if you trust it"
    )
    assert load_tokenizer(folder, trust_remote_code=True).ran


@pytest.mark.parametrize(("files", "said"), BROKEN.values(), ids=BROKEN)
def test_tokenizers_that_cannot_be_loaded(files, said, words, tmp_path):
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        else:  # a change to a whole file
            (tmp_path / name).write_text(json.dumps(json.loads((words / name).read_text()) | content))
    if "tokenizer.json" in files:
        (tmp_path / "tokenizer_config.json").write_bytes((words / "tokenizer_config.json").read_bytes())
    with pytest.raises(DataError) as failure:
        load_tokenizer(tmp_path)
    assert f"tokenizer {tmp_path} cannot be loaded: " in str(failure.value)
    assert said in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(DataError) as failure:
        load_tokenizer("org/model")
    assert str(failure.value) == ("tokenizer org/model does not exist: pass a directory with tokenizer.json or tokenizer.model")


def models():
    """A vocabulary of each kind in `tokenizers`, with <s>, </s> and <pad> among its pieces."""
    from tokenizers import models as kinds

    words = ["<unk>", "<s>", "</s>", "a", "b", "<pad>"]
    numbered = {word: number for number, word in enumerate(words)}
    return {
        "words": kinds.WordLevel(numbered, unk_token="<unk>"),
        "pairs": kinds.BPE(numbered, [], unk_token="<unk>"),
        "pieces": kinds.WordPiece(numbered, unk_token="<unk>"),
        "unigram": kinds.Unigram([(word, -1.0) for word in words], unk_id=0),
    }


KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize("kind", ["words", "pairs", "pieces", "unigram"])
@pytest.mark.parametrize("ends", ["</s>", "<|im_end|>", None])  # in the vocabulary, added after it, not set
def test_special_ids_are_those_of_transformers(kind, ends, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "pad_token": "<pad>"} | ({} if ends is None else {"eos_token": ends})
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models()[kind]), **special).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    expected = {key: getattr(loaded, key) for key in KEYS}
    assert (expected["bos_token_id"], expected["eos_token_id"]) == (1, {"</s>": 2, "<|im_end|>": 6, None: None}[ends])
    given = {key: number for key, number in expected.items() if number is not None}
    assert special_ids(tmp_path).fields == given
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    # As transformers before 5 wrote it: tokens as objects, and the added tokens in the config too.
    objects = {name: {"content": token, "special": True} for name, token in special.items()}
    decoder = {str(token["id"]): token for token in whole["added_tokens"]}
    old = {key: value for key, value in config.items() if key not in special} | objects | {"added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(old))
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {"added_tokens": []}))
    assert special_ids(tmp_path).fields == given
    # Names in a separate file, and only a vocabulary.
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 6}))
    assert special_ids(tmp_path).fields == given


def test_a_token_without_an_id_in_any_file_has_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": 3}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [1], "model": []}')
    assert special_ids(tmp_path).fields == {}
    assert special_ids(tmp_path / "none").fields == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("tokenizer_config.json", "{", "is not valid JSON"), ("tokenizer_config.json", "[1]", "is not a JSON object")],
)
def test_tokenizer_files_that_are_damaged(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} {said}.*: copy the tokenizer again"):
        special_ids(tmp_path)
    (tmp_path / name).rename(tmp_path / "generation_config.json")
    with pytest.raises(DataError, match=rf"generation_config.json {said}"):
        generation_config(tmp_path)


def test_the_generation_config_beside_a_tokenizer(tmp_path):
    assert generation_config(tmp_path) == []
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert [source.fields for source in generation_config(tmp_path)] == [{"eos_token_id": 2}]
