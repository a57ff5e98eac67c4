"""Token sequences from datasets: mixing, held-out sequences, reproducibility across processes, and every error."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mptq.calibration.datasets.corpus import describe
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.tokens import load_tokens
from mptq.errors import DataError
from tests.unit.calibration.conftest import ROWS, VOCABULARY, ids, text, write_indexed, write_json_lines

SMALL = DataOptions(calib_size=10, eval_size=4, seq_length=8)


@pytest.fixture
def rows(tmp_path):
    """30 documents of 10 words: 330 tokens with EOS."""
    return write_json_lines(tmp_path / "rows.jsonl")


@pytest.fixture
def corpus(tmp_path):
    """20 tokenized documents of 12 tokens, none of which is in `rows`."""
    return write_indexed(tmp_path / "corpus", [[ids(1000 + 20 * row, 5), ids(1005 + 20 * row, 7)] for row in range(20)])


def load(path, tokenizer=None, calibrate=True, options=SMALL):
    return load_tokens(replace(options, datasets=(str(path),)), tokenizer, VOCABULARY, calibrate)


def document_of(token):
    """The number of the row that contains a word."""
    return (token - 3) // 20


def test_packed_sequences_are_the_documents_end_to_end(rows, words):
    data = load(rows, words)
    assert [len(sequence) for sequence in data.calibration] == [8] * 10
    assert {sequence.dtype for sequence in data.calibration + data.held_out} == {np.dtype(np.int64)}
    for sequences in (data.held_out, data.calibration):
        stream = np.concatenate(sequences).tolist()
        for start in range(0, len(stream) - 10, 11):
            first = stream[start]
            assert stream[start : start + 11] == [*range(first, first + 10), 2]
            assert first == 3 + 20 * document_of(first)


def test_one_document_per_sequence(rows, words):
    data = load(rows, words, options=replace(SMALL, packed=False, seq_length=64))
    found = sorted(sequence.tolist() for sequence in data.calibration + data.held_out)
    assert len(found) == 14
    assert all(sequence == ids(20 * document_of(sequence[0]), 10) for sequence in found)  # whole, without EOS or padding
    cut = load(rows, words, options=replace(SMALL, packed=False))
    assert {len(sequence) for sequence in cut.calibration} == {8}


@pytest.mark.parametrize("packed", [True, False])
def test_held_out_documents_are_not_calibrated_on(packed, rows, words):
    data = load(rows, words, options=replace(SMALL, packed=packed))
    held, used = (
        {document_of(int(token)) for sequence in sequences for token in sequence if token != 2}
        for sequences in (data.held_out, data.calibration)
    )
    assert held
    assert not held & used


def test_held_out_depends_on_neither_size_nor_calibration(rows, corpus, words):
    options = replace(SMALL, datasets=(str(rows), f"{corpus}:2"))
    found = [
        load_tokens(replace(options, calib_size=size), words, VOCABULARY, calibrate)
        for size, calibrate in ((10, True), (17, True), (3, True), (10, False))
    ]
    assert len({data.account["held_out"]["sha256"] for data in found}) == 1
    assert found[-1].calibration == ()
    assert found[-1].account["calibration"] == describe([])
    assert [len(data.calibration) for data in found] == [10, 17, 3, 0]


@pytest.mark.parametrize("packed", [True, False])
def test_one_document_is_split_into_disjoint_stretches(packed, words, tmp_path):
    one = write_json_lines(tmp_path / "one.jsonl", [{"text": text(0, 14 * 8 + 4)}])
    data = load(one, words, options=replace(SMALL, packed=packed))
    assert np.concatenate(data.held_out + data.calibration).tolist() == ids(0, 14 * 8)
    assert data.account["datasets"][0]["documents"] == 1


@pytest.mark.parametrize("packed", [True, False])
def test_one_text_is_split_into_disjoint_stretches(packed, words, tmp_path):
    (tmp_path / "book.txt").write_text(text(0, 300).replace(" ", "\n"))
    data = load(tmp_path / "book.txt", words, options=replace(SMALL, packed=packed))
    seen = [token for token in np.concatenate(data.held_out + data.calibration).tolist() if token != 2]
    assert len(seen) == len(set(seen)) > 90
    assert set(seen) <= set(ids(0, 300))


def test_datasets_are_mixed_by_weight(rows, corpus, words):
    options = replace(SMALL, datasets=(str(rows), f"{corpus}:3"), calib_size=12, eval_size=4)
    data = load_tokens(options, words, VOCABULARY, True)
    tokenized = [bool((sequence >= 1003).all()) for sequence in data.calibration]
    assert tokenized == [True, False, True, True] * 3
    assert sum(bool((sequence >= 1003).all()) for sequence in data.held_out) == 3
    assert [(row["name"], row["kind"], row["weight"], row["sequences"]) for row in data.account["datasets"]] == [
        ("rows.jsonl", "json-lines", 1.0, 4),
        ("corpus", "megatron", 3.0, 12),
    ]


def test_copies_in_another_dataset_are_not_calibrated_on(rows, words, tmp_path):
    other = write_json_lines(tmp_path / "other.jsonl", ROWS[::-1])
    options = replace(SMALL, datasets=(str(rows), str(other)), packed=False, calib_size=8, eval_size=20)
    data = load_tokens(options, words, VOCABULARY, True)
    held, used = ({sequence.tobytes() for sequence in sequences} for sequences in (data.held_out, data.calibration))
    assert not held & used


def test_tokenized_datasets_need_no_tokenizer(corpus):
    data = load(corpus)
    assert data.account["tokenizer"] is None
    stream = np.concatenate(data.calibration)
    assert stream[:12].tolist() == list(range(stream[0], stream[0] + 12))  # both parts of a document, and no EOS
    assert stream[12] != stream[11] + 1
    assert 2 not in stream


def test_the_account(rows, words):
    data = load(rows, words / "tokenizer.json")
    assert data.account == {
        "datasets": [
            {"name": "rows.jsonl", "kind": "json-lines", "weight": 1.0, "documents": 11, "empty": 0, "copies": 0}
            # 3 documents for 32 tokens, 8 for 80
            | describe(data.held_out + data.calibration)
        ],
        "default_data": False,
        "tokenizer": "words",
        "seed": 0,
        "packed": True,
        "seq_length": 8,
        "calibration": describe(data.calibration),
        "held_out": describe(data.held_out),
        "unseen": describe(data.unseen) | {"name": "plays"},
    }
    assert len(data.unseen) == len(data.held_out)
    assert data.account["calibration"]["sequences"] == 10
    assert data.account["held_out"]["tokens"] == 32


def test_what_is_left_out_is_counted(words, tmp_path):
    """Null and blank documents, and copies of held-out ones: 1 + 26 sequences use all rows but an empty last one."""
    empty = [{"text": None}, {"text": " "}, {"prompt": "w1", "completion": None}, {"messages": None}]
    path = write_json_lines(tmp_path / "rows.jsonl", [*empty, *ROWS[:14], *ROWS[:14]])
    data = load(path, words, options=replace(SMALL, packed=False, seq_length=64, eval_size=1, calib_size=26))
    (row,) = data.account["datasets"]
    assert {key: row[key] for key in ("documents", "empty", "copies")} == {"documents": 27, "empty": 3, "copies": 1}
    assert not {tuple(ids) for ids in data.held_out} & {tuple(ids) for ids in data.calibration}


def test_the_seed_decides_the_order(rows, words):
    found = {load(rows, words, options=replace(SMALL, seed=seed)).account["calibration"]["sha256"] for seed in (0, 0, 1)}
    assert len(found) == 2


ACCOUNT = """
import json, sys
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.tokens import load_tokens
options = DataOptions(tuple(sys.argv[2:]), calib_size=6, eval_size=3, seq_length=8)
print(json.dumps(load_tokens(options, sys.argv[1], 4003, True).account))
"""


def test_every_process_gives_the_same(rows, words, tmp_path):
    """The expected hash is fixed: documents, order and hash of this corpus must be the same in every version."""
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(text(1000 + 100 * number, 20))
    command = [sys.executable, "-c", ACCOUNT, str(words), str(rows), f"{tmp_path / 'texts'}:2"]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": seed}) for seed in "12"
    ]
    one, other = (json.loads(process.communicate()[0]) for process in started)
    assert one == other
    assert one["calibration"]["sha256"] == "4235c682b92adc4dae3b1774dd5b7517fe74b9b6656e1d3c88893abcb97ee2fe"


def test_default_data(words):
    data = load_tokens(DataOptions(calib_size=9, eval_size=3, seq_length=64), words, VOCABULARY, True)
    assert data.account["default_data"]
    assert [(row["name"], row["sequences"]) for row in data.account["datasets"]] == [
        ("technical", 3),
        ("prose", 3),
        ("code", 3),
        ("dialogue", 1),
        ("mathematics", 1),
        ("languages", 1),
    ]


def test_text_of_an_unseen_kind(rows, words, corpus):
    """Where data calibrates, fidelity is measured on a kind of text too that never does, whatever the data."""
    plays = load(rows, words).unseen
    assert plays
    others = load_tokens(replace(SMALL, datasets=()), words, VOCABULARY, True)
    assert [ids.tolist() for ids in others.unseen] == [ids.tolist() for ids in plays]
    assert load(corpus).unseen == ()  # there is no tokenizer
    assert load(rows, words, calibrate=False).unseen == ()
    none = load(rows, words, options=replace(SMALL, eval_size=0))
    assert (none.unseen, none.account["unseen"]) == ((), None)
    assert len(load(rows, words, calibrate=False, options=replace(SMALL, unseen_size=3)).unseen) == 3
    assert load(rows, words, options=replace(SMALL, unseen_size=0)).unseen == ()
    # As many as there are.
    many = load_tokens(
        replace(SMALL, eval_size=1, unseen_size=2000, calib_size=1, seq_length=64, datasets=()), words, VOCABULARY, True
    )
    assert 100 < len(many.unseen) < 2000


def fails(path, tokenizer=None, vocab_size=VOCABULARY, **options):
    with pytest.raises(DataError) as failure:
        load_tokens(replace(SMALL, datasets=(str(path),), **options), tokenizer, vocab_size, True)
    return str(failure.value)


def test_too_little_data(rows, words, tmp_path):
    more = "add datasets, or use fewer or shorter sequences"
    assert fails(rows, words, calib_size=60) == (
        f"dataset '{rows}' has 41 usable sequences of 8 tokens, but 64 are needed (4 held out, 60 to calibrate): {more}"
    )
    assert fails(rows, words, eval_size=50) == (
        f"dataset '{rows}' has 41 usable sequences of 8 tokens, but 60 are needed (50 held out, 10 to calibrate): {more}"
    )
    short = write_json_lines(tmp_path / "short.jsonl", [*ROWS[:12], {"text": ""}, {"text": " \n"}, {"text": "w1"}])
    assert fails(short, words, packed=False) == (
        f"dataset '{short}' has 12 usable sequences (one document each), not counting 3 empty documents, but 14 are needed "
        f"(4 held out, 10 to calibrate): {more}"
    )
    doubled = write_json_lines(tmp_path / "doubled.jsonl", [*ROWS[:5], *ROWS[:5], {"text": None}])
    assert fails(doubled, words, packed=False, calib_size=6).startswith(
        f"dataset '{doubled}' has 8 usable sequences (one document each), not counting 1 empty documents and 2 copies of "
        "held-out documents, but 10 are needed"
    )
    (tmp_path / "empty.txt").touch()
    assert "has 0 usable sequences" in fails(tmp_path / "empty.txt", words)
    with pytest.raises(
        DataError, match=r"default data has \d+ usable .*'technical'.*, but 2001 are .*: pass --calib-dataset, or use"
    ):
        load_tokens(replace(SMALL, calib_size=10_000, seq_length=512), words, VOCABULARY, True)


def test_too_little_data_is_accepted_if_no_sequences_are_needed(rows, words):
    data = load(rows, words, calibrate=False, options=replace(SMALL, eval_size=0))
    assert (data.calibration, data.held_out) == ((), ())


def test_ids_beyond_the_vocabulary(rows, words, corpus, tmp_path):
    said = fails(corpus, vocab_size=1000)
    assert said.startswith(f"dataset '{corpus}' has token id 1")
    assert said.endswith("but the model's vocabulary size is 1000: it was tokenized with another tokenizer")
    said = fails(rows, words, vocab_size=10)
    assert said.startswith(f"tokenizer {words} produces token id ")
    assert said.endswith(f"but the model's vocabulary size is 10 (dataset '{rows}'): it belongs to another model")
    negative = write_indexed(tmp_path / "negative", [[[*range(-1, 200)]]])
    assert "has token id -1, but" in fails(negative)


def test_a_tokenizer_is_needed(rows):
    assert fails(rows) == f"no tokenizer for dataset '{rows}': pass the directory of the model's tokenizer"


def test_options_are_checked_first(rows):
    assert fails(rows, seq_length=1) == "seq_length must be at least 2, not 1"
