"""Every kind of dataset, from real files: each document once, in the order of the seed; one-line errors for damage."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from mptq.calibration.datasets import default, files, huggingface
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.datasets.sources import find_sources
from mptq.errors import DataError
from tests.unit.calibration.conftest import ROWS, text, write_indexed, write_json_lines

TEXTS = [row["text"] for row in ROWS]


def read(path, **options):
    """Contents of the documents of a dataset, whose kind is recognized by its name."""
    (source,) = find_sources((str(path),))
    options = DataOptions(**options)
    return [document.content for document in source.kind.read(source.path, options, np.random.PCG64(options.seed))]


def fails(path, **options):
    with pytest.raises(DataError) as failure:
        read(path, **options)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def write_parquet(path, rows=ROWS, group=7):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_saved(folder, rows=ROWS, split=None):
    import datasets

    made = datasets.Dataset.from_list(rows)
    (datasets.DatasetDict({split: made}) if split else made).save_to_disk(folder)
    return folder


def write_directory(folder, suffix=".jsonl"):
    folder.mkdir()
    write = write_json_lines if suffix == ".jsonl" else write_parquet
    write(folder / f"train-0{suffix}", ROWS[:20])
    write(folder / f"train-1{suffix}", ROWS[20:])
    write(folder / f"test-0{suffix}", [{"text": "not this"}])
    return folder


TABLES = {
    "json-lines": lambda folder: write_json_lines(folder / "rows.jsonl"),
    "json": lambda folder: write_json_lines(folder / "rows.json"),
    "parquet": lambda folder: write_parquet(folder / "rows.parquet"),
    "saved": lambda folder: write_saved(folder / "saved"),
    "saved splits": lambda folder: write_saved(folder / "saved", split="train"),
    "directory": lambda folder: write_directory(folder / "data"),
    "directory of parquet": lambda folder: write_directory(folder / "data", ".parquet"),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_every_row_of_a_table_is_read_once(make, tmp_path):
    path = make(tmp_path)
    first, again, other = read(path), read(path), read(path, seed=1)
    assert sorted(first) == sorted(other) == sorted(TEXTS)
    assert first == again
    assert len({tuple(first), tuple(other), tuple(TEXTS)}) == 3


def test_streamed_rows_are_shuffled_within_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "WINDOW", 10)
    found = read(write_directory(tmp_path / "data"))
    for start in (0, 10, 20):
        assert sorted(found[start : start + 10]) == sorted(TEXTS[start : start + 10])
        assert found[start : start + 10] != TEXTS[start : start + 10]


def test_a_text_is_cut_into_stretches_without_loss(tmp_path):
    lines = [f"{number} Zeile mit Ümläuten und 漢字 🙂\n" for number in range(500)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    found = read(path, seq_length=32)
    size = path.stat().st_size
    assert len(found) == -(-size // 256)
    assert all(part.endswith("\n") and len(part.encode()) <= 2 * 256 for part in found)
    assert sorted("".join(found).splitlines()) == sorted("".join(lines).splitlines())
    assert sum(len(part.encode()) for part in found) == size


def test_a_text_without_lines_is_cut_between_characters(tmp_path):
    path = tmp_path / "long.md"
    path.write_text("é漢🙂" * 300)
    found = read(path, seq_length=2)
    assert len(found) > 100
    assert sum(map(len, found)) == 900
    assert {part[:1] for part in found} == set("é漢🙂")


def test_a_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt") == ["hello"]


def test_a_directory_of_texts_does_not_depend_on_the_file_system(tmp_path):
    found = []
    for folder, order in (("one", (0, 1, 2)), ("two", (2, 0, 1))):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for number in order:
            name = f"deep/{number}.md" if number == 1 else f"{number}.txt"
            (tmp_path / folder / name).write_text(text(100 * number, 50))
        found.append(read(tmp_path / folder))
    assert found[0] == found[1]
    assert sorted(found[0]) == sorted(text(100 * number, 50) for number in range(3))


def test_lines_are_found_across_the_borders_of_the_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SCAN", 16)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS))  # blank lines, and no line end after the last row
    assert sorted(read(path)) == sorted(TEXTS)


FORMS = [
    ({"text": "a b"}, "a b"),
    ({"prompt": "a ", "completion": "b"}, "a b"),
    ({"messages": [{"role": "user", "content": "a", "tool": None}]}, [{"role": "user", "content": "a"}]),
    ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}, [{"role": "user"}, {"role": "assistant"}]),
    ({"text": None, "messages": [{"role": "user"}]}, [{"role": "user"}]),
]


@pytest.mark.parametrize(("row", "content"), FORMS)
def test_forms_of_a_row(row, content, tmp_path):
    assert read(write_json_lines(tmp_path / "rows.jsonl", [row])) == [content]


def test_chats_in_tables(tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "w1"}]
    row = {"messages": chat}
    assert read(write_parquet(tmp_path / "rows.parquet", [row])) == [chat]
    assert read(write_saved(tmp_path / "saved", [row])) == [chat]


BAD_ROWS = {
    "no json": ("{", "line 2: not valid JSON"),
    "no UTF-8": (b'{"text": "\xff"}', "line 2: not valid JSON ('utf-8' codec"),
    "array": ("[1]", "line 2: the row is not a JSON object"),
    "nothing known": (
        '{"content": "a", "id": 1}',
        "line 2: the row has no text, messages, or prompt and completion, only content, id",
    ),
    "number": ('{"text": 1}', "line 2: text must be a string"),
    "no role": ('{"messages": [{"content": "a"}]}', "line 2: messages must be a list of messages, each with a role"),
    "no messages": ('{"messages": []}', "line 2: messages must be a list"),
    "mixed": ('{"prompt": "a", "completion": []}', "line 2: prompt and completion must be two strings or two lists"),
    "half": ('{"prompt": "a"}', "line 2: the row has no"),
}


@pytest.mark.parametrize(("line", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    assert f"{path}, {said}" in fails(path)


@pytest.mark.parametrize(
    ("make", "suffix"),
    [(write_json_lines, ".jsonl"), (write_parquet, ".parquet"), (write_saved, "")],
    ids=["jsonl", "parquet", "saved"],
)
def test_null_is_an_empty_document(make, suffix, tmp_path):
    assert sorted(read(make(tmp_path / f"rows{suffix}", [{"text": "a"}, {"text": None}]))) == ["", "a"]
    chat = [{"role": "user", "content": "hello"}]
    assert read(make(tmp_path / f"more{suffix}", [{"text": None, "messages": chat}])) == [chat]


def test_bad_files_are_named(tmp_path):
    columns = write_parquet(tmp_path / "columns.parquet", [{"content": "a", "prompt": "b"}])
    assert fails(columns) == f"{columns} has no columns text, messages, or prompt and completion: it has content, prompt"
    numbers = write_parquet(tmp_path / "numbers.parquet", [{"text": 1}])
    assert fails(numbers) == f"{numbers}, row 1: text must be a string"
    broken = tmp_path / "broken.parquet"
    broken.write_text("PAR1")
    assert f"{broken} cannot be read as Parquet: " in fails(broken)
    late = tmp_path / "late.txt"
    late.write_bytes(b"text\n" * 20000 + b"\xff\n")
    assert f"{late}, byte 100000: not UTF-8 text" in fails(late)
    splits = write_saved(tmp_path / "splits", split="test")
    assert "has no split train: pass the directory of one of its splits (test)" in fails(splits)
    assert len(read(splits / "test")) == 30
    other = write_saved(tmp_path / "other", [{"a": 1}])
    assert fails(other) == f"{other} has no columns text, messages, or prompt and completion: it has a"
    (other / "state.json").write_text("{")
    assert f"{other} cannot be read as a saved dataset: " in fails(other)
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded: The directory at" in fails(tmp_path / "empty")
    (tmp_path / "empty" / "test.jsonl").write_text('{"text": "a"}\n')
    assert "cannot be loaded: Bad split: train" in fails(tmp_path / "empty")


def test_empty_files_hold_no_documents(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        assert read(tmp_path / name) == []


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_documents(suffix, dtype, tmp_path):
    documents = [[[1, 2, 3]], [[4], [5, 6]], [], [[65000]]]
    prefix = write_indexed(tmp_path / "corpus", documents, dtype)
    found = read(f"{prefix}{suffix}")
    assert sorted(map(list, found)) == [[], [1, 2, 3], [4, 5, 6], [65000]]
    assert {array.dtype for array in found} == {np.dtype("int64")}


def test_no_more_of_a_megatron_document_is_read_than_a_run_uses(tmp_path):
    prefix = write_indexed(tmp_path / "corpus", [[list(range(100)), list(range(100, 200))]])
    (found,) = read(prefix, calib_size=10, eval_size=5, seq_length=10)
    assert found.tolist() == list(range(150))


def test_damaged_megatron_datasets_are_named(tmp_path):
    index = tmp_path / "corpus.idx"
    prefix = write_indexed(tmp_path / "corpus", [[[1, 2, 3]], [[4, 5]]])
    whole, tokens = index.read_bytes(), (tmp_path / "corpus.bin").read_bytes()
    index.write_bytes(whole[:-1])
    assert fails(prefix) == f"{prefix}.idx or .bin is truncated: copy it again"
    index.write_bytes(b"RIFF" + whole[4:])
    assert fails(prefix) == f"{index} is not the index of a Megatron dataset: it does not begin with MMIDIDX"
    index.write_bytes(whole[:9] + bytes([2]) + whole[10:])
    assert fails(prefix) == f"{index} has version 2 of Megatron's indexed dataset format: only version 1 is supported"
    index.write_bytes(whole)
    for rest in (b"", tokens[:-4]):
        (tmp_path / "corpus.bin").write_bytes(rest)
        assert "truncated" in fails(prefix) or "does not match its .idx" in fails(prefix)


@pytest.mark.parametrize("kind", [*default.WEIGHTS, default.UNSEEN])
def test_default_documents(kind):
    """Each kind is enough for a default run with its share of 80 sequences of 512 tokens, and no text is there twice."""
    rows = [json.loads(line) for line in (default.TEXTS / f"{kind}.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    assert len({row["title"] for row in rows}) == len(set(texts)) == len(rows)
    share = default.WEIGHTS.get(kind, 1.5) / sum(default.WEIGHTS.values())
    assert sum(map(len, texts)) > 1.2 * 4 * 80 * 512 * share
    stretches = [document.content for document in default.read(kind, DataOptions(), np.random.PCG64(0))]
    assert sum(map(len, stretches)) == sum(map(len, texts))
    assert kind in (default.TEXTS / "NOTICE").read_text()


def test_the_default_data_is_small():
    """In a wheel, which is compressed like this."""
    packed = sum(len(zlib.compress(file.read_bytes())) for file in default.TEXTS.iterdir())
    assert packed < 1_000_000


HUB = """
from tests.unit.calibration.datasets.test_readers import TEXTS, fails, read
assert sorted(read("org/rows")) == sorted(TEXTS), "from the cache"
assert sorted(read("org/rows/default")) == sorted(TEXTS), "with its config"
print(fails("org/nothing"))
print(fails("org/rows/other"))
"""


def test_hub_datasets_offline(tmp_path):
    """Cached datasets are read, others are a one-line error. The cache has the layout that `datasets` uses."""
    import datasets

    rows = write_json_lines(tmp_path / "rows.jsonl")
    made = tmp_path / "cache" / "org___rows" / "default" / "0.0.0" / "0123"
    builder = datasets.load_dataset_builder("json", data_files=str(rows), cache_dir=str(tmp_path / "scratch"))
    builder.download_and_prepare(str(made))
    (made / "json-train.arrow").rename(made / "rows-train.arrow")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=os.environ | offline, check=False)
    assert done.returncode == 0, done.stderr
    unknown, config = done.stdout.splitlines()
    assert unknown.startswith("dataset org/nothing cannot be loaded: Couldn't reach 'org/nothing' on the Hub")
    assert unknown.endswith("; without network access, pass a directory that it was downloaded to")
    assert config.startswith("dataset org/rows/other cannot be loaded: ")
