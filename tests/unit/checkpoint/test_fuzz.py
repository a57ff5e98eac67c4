"""Corrupted checkpoints give an MptqError or the right values, and never use more memory than their size justifies."""

import contextlib
import functools
import os
import pickle
import shutil
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties

from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError
from mptq.inspection import inspect
from tests.support.synthetic_checkpoints import SHARD, Maker, saved, small

NAME = "decoder.layers.weight"


def fuzzing(test):
    """Marks a property test of many examples."""
    return pytest.mark.slow(settings(max_examples=150)(test))


@functools.cache
def expected():
    """Returns the tensors of `small()` by name, and the bytes of its two files."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        directory = small().write(Path(folder))
        return contents(directory), (directory / ".metadata").read_bytes(), (directory / SHARD).read_bytes()


def contents(directory):
    """Reads every tensor of a checkpoint."""
    checkpoint = open_checkpoint(directory)
    reader = Reader(checkpoint)
    found = {}
    for name, tensor in checkpoint.tensors.items():
        out = torch.empty(tensor.spec.shape, dtype=getattr(torch, tensor.spec.dtype))
        found[name] = reader.read(name, out)
    return found


def write(tmp_path, metadata, shard):
    shutil.rmtree(tmp_path / "iter_0000005", ignore_errors=True)
    directory = tmp_path / "iter_0000005"
    directory.mkdir()
    (directory / ".metadata").write_bytes(metadata)
    (directory / SHARD).write_bytes(shard)
    return directory


def survives(directory):
    """Returns the contents, or None on a CheckpointError; checks that the file sizes justify the memory used."""
    size = sum(file.stat().st_size for file in directory.iterdir())
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            inspect(directory)
        with contextlib.suppress(CheckpointError):
            return contents(directory)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 300 * size + (4 << 20)


def mutated(data, original):
    """Returns `original` with one to three bytes set to random values."""
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed)


@given(st.data())
@fuzzing
def test_changed_bytes_of_the_shard(tmp_path, data):
    """Only the original values are ever read: the CRC-32 or the metadata reveals all others."""
    found, metadata, shard = expected()
    changed = mutated(data, shard)
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(shard)))]
    again = survives(write(tmp_path, metadata, changed))
    assert again is None or all(torch.equal(again[name], found[name]) for name in found)


@given(st.data())
@fuzzing
def test_changed_bytes_of_the_metadata(tmp_path, data):
    found, metadata, shard = expected()
    again = survives(write(tmp_path, mutated(data, metadata), shard))
    # A changed name makes a different checkpoint, but a value under an original name must be the original one.
    assert again is None or all(torch.equal(value, found[name]) for name, value in again.items() if name in found)


ODD = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, True, 1.5, None, "x", (), (1,), [2], b"x"])


@given(ODD, ODD, st.sampled_from(["offset", "length", "relative_path"]), st.integers(0, 7))
@fuzzing
def test_odd_places_of_records(tmp_path, value, other, field, which):
    made = small()
    info = list(made.metadata.storage_data.values())[which % len(made.metadata.storage_data)]
    setattr(info, field, value)
    info.length = other if field != "length" and other is not None else info.length
    found, _, shard = expected()
    again = survives(write(tmp_path, pickle.dumps(made.metadata), shard))
    assert again is None or all(torch.equal(again[name], found[name]) for name in found)


@given(st.lists(ODD, max_size=4), st.sampled_from(["size", "offsets", "sizes"]), st.integers(0, 3))
@fuzzing
def test_odd_shapes(tmp_path, dims, field, which):
    made = small()
    entry = made.metadata.state_dict_metadata[NAME]
    odd = OddSize(dims)
    if field == "size":
        entry.size = odd
    else:
        chunk = entry.chunks[which]
        entry.chunks[which] = ChunkStorageMetadata(
            *(odd if name == field else getattr(chunk, name) for name in ("offsets", "sizes"))
        )
    found, _, shard = expected()
    again = survives(write(tmp_path, pickle.dumps(made.metadata), shard))
    assert again is None or all(torch.equal(again[name], found[name]) for name in found)


class OddSize:
    """Pickles as a torch.Size of arbitrary values."""

    def __init__(self, dims):
        self.dims = tuple(dims)

    def __reduce__(self):
        return torch.Size, (self.dims,)


CHANGES = {
    "huge shape": (lambda m: vary(m, size=torch.Size((2**40, 2**40, 2**40))), "has chunks for 120 of 1329227995784915872903"),
    "huge chunk": (
        lambda m: huge(m, torch.Size((2**40, 6, 5))),
        "has chunks with more bytes than their records",
    ),
    "other dtype": (lambda m: vary(m, properties=TensorProperties(torch.float32)), "but the metadata says float32"),
    "unknown dtype": (lambda m: vary(m, properties=TensorProperties(torch.complex64)), "the unknown dtype complex64"),
    "missing chunk": (lambda m: m.state_dict_metadata[NAME].chunks.pop(), "has chunks for 90 of 120 elements"),
    "overlapping chunks": (
        lambda m: vary_chunk(m, 1, torch.Size((0, 2, 0))),
        r"\(KeyError\(\(0, 2, 0\)\)\)|has chunks that overlap",
    ),
    "overlapping records": (lambda m: move(m, 1, -1), "that overlap: the checkpoint is damaged"),
    "a record twice": (lambda m: same(m, 0, 1), "that overlap: the checkpoint is damaged"),
    "a record beyond the file": (lambda m: move(m, 0, 10**9), "is truncated"),
    "a name with an escape": (lambda m: rename(m, "a\x1b[2Jb"), "invalid entry name 'a"),
    "a name with a lone surrogate": (lambda m: rename(m, "a\ud800"), "invalid entry name 'a"),
    "a shard above": (lambda m: path(m, "../" + SHARD), "which is outside the checkpoint"),
    "a shard at the root": (lambda m: path(m, "/etc/passwd"), "which is outside the checkpoint"),
    "a shard below and above": (lambda m: path(m, "a/../../x"), "which is outside the checkpoint"),
    "no shard": (lambda m: path(m, ""), "which is outside the checkpoint"),
    "a directory": (lambda m: path(m, "folder"), "is not a file"),
    "a device": (lambda m: path(m, "pipe"), "is not a file"),
    "a link to a device": (lambda m: path(m, "link"), "is not a file"),
    "compressed shards": (
        lambda m: setattr(first(m), "transform_descriptors", ["zstd"]),
        "shards were transformed",
    ),
}


def first(metadata):
    return next(iter(metadata.storage_data.values()))


def path(metadata, value):
    first(metadata).relative_path = value


def vary(metadata, **fields):
    metadata.state_dict_metadata[NAME] = replace(metadata.state_dict_metadata[NAME], **fields)


def huge(metadata, size):
    entry = metadata.state_dict_metadata[NAME]
    entry.size, entry.chunks = size, [ChunkStorageMetadata(torch.Size((0, 0, 0)), size)]


def vary_chunk(metadata, number, offsets):
    chunks = metadata.state_dict_metadata[NAME].chunks
    chunks[number] = replace(chunks[number], offsets=offsets)


def move(metadata, number, by):
    list(metadata.storage_data.values())[number].offset += by


def same(metadata, one, other):
    records = list(metadata.storage_data.values())
    records[one].offset, records[one].length = records[other].offset, records[other].length


def rename(metadata, name):
    metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop(NAME)
    for index in list(metadata.storage_data):
        if index.fqn == NAME:
            metadata.storage_data[replace(index, fqn=name)] = metadata.storage_data.pop(index)


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_errors_name_the_problem(tmp_path, change, message):
    made = small()
    directory = made.write(tmp_path)
    (directory / "folder").mkdir()
    os.mkfifo(directory / "pipe")
    (directory / "link").symlink_to("/dev/zero")
    change(made.metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(made.metadata))
    with pytest.raises(CheckpointError, match=message) as failure:
        contents(directory)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 700


def test_shards_in_folders_and_behind_links_are_read(tmp_path):
    made = small()
    directory = made.write(tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    (directory / SHARD).rename(tmp_path / "elsewhere" / "shard")
    (directory / "shards").mkdir()
    (directory / "shards" / "linked").symlink_to(tmp_path / "elsewhere" / "shard")
    for info in made.metadata.storage_data.values():
        info.relative_path = "shards/linked"
    (directory / ".metadata").write_bytes(pickle.dumps(made.metadata))
    assert all(torch.equal(value, expected()[0][name]) for name, value in contents(directory).items())


def test_arguments_that_cannot_be_printed(tmp_path):
    laughs = [1]
    for _ in range(40):
        laughs = [laughs, laughs]
    deep = []
    for _ in range(500):
        deep = [deep]
    itself = {}
    itself["me"] = itself
    for number, args in enumerate(({"window_size": laughs}, {"deep": deep}, {"text": "\ud800"}, itself)):
        from argparse import Namespace

        made = Maker()
        made.tensor("weight", torch.ones(2))
        made.blob("common_state/shard_0_1", saved([{"args": Namespace(**args)}]))
        with pytest.raises(CheckpointError, match="the arguments"):
            open_checkpoint(made.write(tmp_path / str(number)))
