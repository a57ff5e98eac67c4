"""Recognition of dataset names, their weights, and errors for unknown names."""

import pytest

from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.datasets.sources import find_sources, unseen_source
from mptq.calibration.tokens import check_datasets, needs_tokenizer
from mptq.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with one file of each kind; the files need not be valid."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.md", "notes", "a.jsonl", "a.JSON", "a.parquet", "ids.bin", "ids.idx", "alone.bin", "a.txt:2"):
        (tmp_path / name).write_text("text\n")
    (tmp_path / "alone.bin").write_bytes(b"\x00\x01")
    for inner in ("texts/a.txt", "texts/.hidden", "mixed/a.txt", "mixed/b.csv", "saved/state.json", "splits/dataset_dict.json"):
        (tmp_path / inner).parent.mkdir(exist_ok=True)
        (tmp_path / inner).write_text("{}")
    return tmp_path


KINDS = {
    "a.txt": "text",
    "a.md": "text",
    "notes": "text",
    "a.txt:2": "text",
    "a.jsonl": "json-lines",
    "a.JSON": "json-lines",
    "a.parquet": "parquet",
    "ids": "megatron",
    "ids.bin": "megatron",
    "ids.idx": "megatron",
    "texts": "text",
    "mixed": "directory",
    "saved": "saved",
    "splits": "saved",
    "org/name": "hub",
    "org/name/config": "hub",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_kinds(name, kind, folder):
    (source,) = find_sources((name,))
    assert (source.kind.name, source.path, source.weight) == (kind, name, 1.0)


@pytest.mark.parametrize("name", KINDS)
def test_weights(name, folder):
    (source,) = find_sources((f"{name}:0.25",))
    assert (source.kind.name, source.path, source.weight) == (KINDS[name], name, 0.25)


def test_names_in_reports_have_no_path(folder):
    assert [source.name for source in find_sources((f"{folder}/a.txt", "./texts", "ids.bin", "org/name"))] == [
        "a.txt",
        "texts",
        "ids.bin",
        "org/name",
    ]


def test_default_datasets():
    found = find_sources(())
    assert [source.name for source in found] == ["technical", "prose", "code", "dialogue", "mathematics", "languages"]
    assert {source.kind.name for source in [*found, unseen_source()]} == {"default"}
    assert unseen_source().name not in [source.name for source in found]


UNKNOWN = {
    "nothing": "'nothing' does not exist: pass a file, a directory, the prefix of .bin and .idx, or org/name on the Hub",
    "data/nothing.txt": "'data/nothing.txt' does not exist",
    "./org/name": "'./org/name' does not exist",
    "/org/name": "'/org/name' does not exist",
    "a/b/c/d": "'a/b/c/d' does not exist",
    "": "'' does not exist",
    ":2": "'' does not exist",
    "a.txt:x": "'a.txt:x' does not exist",
    "alone.bin": "'alone.bin': a Megatron indexed dataset needs both alone.bin and .idx",
    "a.txt:0": "'a.txt:0': the weight must be a positive number",
    "a.txt:-1": "the weight must be a positive number",
    "a.txt:nan": "the weight must be a positive number",
    "a.txt:inf": "the weight must be a positive number",
}


@pytest.mark.parametrize(("name", "said"), UNKNOWN.items())
def test_unknown_names(name, said, folder):
    with pytest.raises(DataError) as failure:
        find_sources((name,))
    assert said in str(failure.value)


def test_a_binary_file_is_not_a_dataset(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="is not a UTF-8 text, JSON Lines"):
        find_sources(("model.safetensors",))


@pytest.mark.parametrize(
    "names", [("a.txt", "./a.txt:3"), ("texts", "texts/a.txt"), ("ids", "ids.bin"), ("org/name", "org/name")], ids=str
)
def test_overlapping_datasets(names, folder):
    with pytest.raises(DataError, match="overlap: pass only one of them, with a weight"):
        find_sources(names)


def test_all_problems_are_reported_in_one_line(folder):
    options = DataOptions(("nothing", "a.txt:0", "a.md"), calib_size=0, eval_size=-1, seq_length=1, seed=-1)
    with pytest.raises(DataError) as failure:
        check_datasets(options)
    assert str(failure.value) == (
        "calib_size must be at least 1, not 0; eval_size must be at least 0, not -1; seq_length must be at least 2, not 1; "
        "seed must be at least 0, not -1; dataset 'nothing' does not exist: pass a file, a directory, the prefix of .bin and "
        ".idx, or org/name on the Hub; dataset 'a.txt:0': the weight must be a positive number"
    )
    check_datasets(DataOptions())


@pytest.mark.parametrize("name", ["s3://bucket/rows.jsonl", "s3://bucket/rows.jsonl:2", "https://example.org/rows.parquet"])
def test_remote_datasets_are_not_read(name):
    with pytest.raises(DataError) as failure:
        find_sources((name,))
    assert str(failure.value) == f"dataset {name.removesuffix(':2')!r}: remote paths are not read: mount or copy it"


def test_only_tokenized_datasets_need_no_tokenizer(folder):
    assert not needs_tokenizer(DataOptions(("ids:2",)))
    assert needs_tokenizer(DataOptions(("ids", "a.txt")))
    assert needs_tokenizer(DataOptions())
    with pytest.raises(DataError):
        needs_tokenizer(DataOptions(("nothing",)))
