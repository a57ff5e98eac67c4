"""Reads records of every kind: valid, unusual and damaged."""

import contextlib
import gc
import io
import os
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from mptq.checkpoint import stored_tensor
from mptq.checkpoint.index import open_checkpoint, read_blob
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError
from mptq.types import TensorSlice
from tests.support.synthetic_checkpoints import SHARD, Maker, saved, small

VALUES = torch.arange(24.0).reshape(4, 6)


def one(tmp_path, raw, like=VALUES):
    """Returns a reader of a checkpoint with one tensor, whose record is `raw`."""
    made = Maker()
    made.raw_tensor("weight", like, raw)
    return Reader(open_checkpoint(made.write(tmp_path)))


def read(reader, name="weight", dtype=None, index=()):
    spec = reader.checkpoint.tensors[name].spec
    return reader.read(name, torch.empty(spec.shape[len(index) :], dtype=dtype or getattr(torch, spec.dtype)), index)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
DTYPES += [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    value = VALUES.to(dtype)
    found = read(one(tmp_path, saved(value), value))
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize(
    "value",
    [
        VALUES.reshape(6, 4).t(),
        torch.arange(30.0).reshape(5, 6)[1:],
        torch.arange(48.0).reshape(4, 12)[:, ::2],
        torch.arange(6.0).expand(4, 6).contiguous(),
        torch.nn.Parameter(VALUES, requires_grad=False),
        torch.nn.Parameter(VALUES),
    ],
    ids=["transposed", "view", "strided", "plain", "parameter", "parameter with gradient"],
)
def test_tensors_that_are_not_their_storage(tmp_path, value):
    assert torch.equal(read(one(tmp_path, saved(value))), value)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 2), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_reading_some_rows_at_a_time(tmp_path_factory, heights, halves, height, transposed, stacked):
    """Reads `height` rows at a time of a tensor in chunks of `heights` rows and, if `halves` is 2, half the columns."""
    value = torch.randn(2 if stacked else 1, sum(heights), 4).bfloat16()
    value = value.transpose(1, 2).contiguous().transpose(1, 2) if transposed else value
    starts = [sum(heights[:place]) for place in range(len(heights))]
    boxes = [
        ((0, start, column), (len(value), rows, 4 // halves))
        for start, rows in zip(starts, heights, strict=True)
        for column in range(0, 4, 4 // halves)
    ]
    made = Maker()
    made.tensor("weight", value, boxes)
    reader = Reader(open_checkpoint(made.write(tmp_path_factory.mktemp("rows"))))
    for layer in range(len(value)):
        for first in range(0, sum(heights), height):
            expected = value[layer, first : first + height]
            assert torch.equal(reader.read("weight", torch.empty_like(expected), (layer,), first), expected)


def test_rows_of_concatenated_parts(tmp_path):
    made = Maker()
    for name in "ab":
        made.tensor(name, VALUES + ord(name), [((0, 0), (4, 6))])
    reader = Reader(open_checkpoint(made.write(tmp_path)))
    parts = [TensorSlice(name, (), (4, 6)) for name in "ab"]
    whole = torch.cat([VALUES + ord(name) for name in "ab"])
    for first in range(8):
        for last in range(first + 1, 9):
            assert torch.equal(reader.read_parts(parts, torch.empty(last - first, 6), first), whole[first:last])


def test_a_changed_row_is_found_with_the_first(tmp_path):
    raw = bytearray(saved(VALUES))
    raw[raw.index(VALUES.numpy().tobytes()) + VALUES.nbytes - 1] ^= 1
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        one(tmp_path, bytes(raw)).read("weight", torch.empty(1, 6))


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1, max_size=2), st.booleans())
@settings(max_examples=40)
def test_any_chunks_of_a_stack(tmp_path_factory, layers, together, shape, cast):
    value = torch.randn(layers, *shape).bfloat16()
    boxes = [
        ((first, row, *[0] * (len(shape) - 1)), (min(together, layers - first), 1, *shape[1:]))
        for first in range(0, layers, together)
        for row in range(shape[0])
    ]
    made = Maker()
    made.tensor("weight", value, boxes)
    reader = Reader(open_checkpoint(made.write(tmp_path_factory.mktemp("stack"))))
    dtype = torch.float32 if cast else None
    assert torch.equal(read(reader, dtype=dtype), value)
    for layer in range(layers):
        assert torch.equal(read(reader, dtype=dtype, index=(layer,)), value[layer])
        assert torch.equal(read(reader, dtype=dtype, index=(layer, shape[0] - 1)), value[layer, -1])


def test_a_part_of_a_tensor_with_scattered_rows(tmp_path):
    value = torch.randn(3, 8).bfloat16()
    made = Maker()
    made.tensor("weight", value, [((0, 0), (3, 5)), ((0, 5), (3, 3))])
    reader = Reader(open_checkpoint(made.write(tmp_path)))
    assert torch.equal(read(reader), value)
    rows = torch.zeros(6, 8, dtype=torch.bfloat16)
    reader.read("weight", rows[1:4])
    assert torch.equal(rows[1:4], value)
    assert not rows[4:].any()


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path):
    directory = small().write(tmp_path)
    checkpoint = open_checkpoint(directory)
    raw = (directory / SHARD).read_bytes()
    record = checkpoint.tensors["decoder.layers.weight"].chunks[1].record
    expected = read(Reader(checkpoint), "decoder.layers.weight")
    for place in range(record.offset, record.offset + record.length):
        changed = bytearray(raw)
        changed[place] ^= 1 << (place % 8)
        (directory / SHARD).write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            assert torch.equal(read(Reader(checkpoint), "decoder.layers.weight"), expected)


def test_the_error_for_a_flipped_bit_names_the_tensor_and_file(tmp_path):
    raw = bytearray(saved(VALUES))
    raw[raw.find(VALUES.numpy().tobytes()) + 7] ^= 1
    with pytest.raises(CheckpointError) as failure:
        read(one(tmp_path, bytes(raw)))
    assert str(failure.value) == (
        f"weight in {tmp_path / 'iter_0000005' / SHARD} at byte 0 has changed since it was written (CRC-32): "
        "copy the checkpoint again"
    )


def test_a_flipped_bit_of_a_byte_item_is_found(tmp_path):
    made = small()
    raw = saved(VALUES)
    made.blob("item", raw)
    directory = made.write(tmp_path)
    checkpoint = open_checkpoint(directory)
    assert read_blob(directory, checkpoint.blobs["item"]) == raw
    made.shard[checkpoint.blobs["item"].offset + raw.find(VALUES.numpy().tobytes())] ^= 4
    (directory / SHARD).write_bytes(made.shard)
    with pytest.raises(CheckpointError, match="data/0 has changed since it was written"):
        read_blob(directory, checkpoint.blobs["item"])


def test_a_chunk_of_many_layers_is_checked_once(tmp_path, monkeypatch):
    """Reading every layer of a chunk takes twice its bytes, not its bytes times the number of layers."""
    layers = 16
    value = torch.randn(layers, 32, 32)
    made = Maker()
    made.tensor("weight", value)
    reader = Reader(open_checkpoint(made.write(tmp_path)))
    counts = []
    crc32 = isal_zlib.crc32
    monkeypatch.setattr(isal_zlib, "crc32", lambda data, crc=0: counts.append(len(data)) or crc32(data, crc))
    bytes_read = []
    preadv = os.preadv
    monkeypatch.setattr(stored_tensor.os, "preadv", lambda *args: bytes_read.append(preadv(*args)) or bytes_read[-1])
    for layer in range(layers):
        assert torch.equal(read(reader, index=(layer,)), value[layer])
    assert sum(bytes_read) <= 2 * value.nbytes
    assert sum(count for count in counts if count > 1000) <= 2 * value.nbytes


def test_reading_leaves_nothing_to_the_garbage_collector(tmp_path):
    """Uncollected garbage between large tensors fragments memory: 2.5 GB instead of 1 GB."""
    value = torch.randn(4, 8)
    made = Maker()
    made.tensor("weight", value)
    checkpoint = open_checkpoint(made.write(tmp_path))
    read(Reader(checkpoint))
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            assert torch.equal(read(Reader(checkpoint)), value)
        assert gc.collect() < 30
    finally:
        gc.enable()


def test_writers_may_leave_the_crc_out(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        raw = saved(VALUES)
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read(one(tmp_path, raw)), VALUES)


def rezipped(raw, compression=zipfile.ZIP_STORED, **changed):
    """Returns the record with some members replaced, or omitted if None."""
    source, target = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for info in source.infolist():
            key = info.filename.partition("/")[2].replace("/", "_").replace(".", "_")
            content = changed.get(key, source.read(info))
            if content is not None:
                archive.writestr(info.filename, content)
    return target.getvalue()


RAW = saved(VALUES)
BAD = {
    "compressed": (rezipped(RAW, zipfile.ZIP_DEFLATED), "compressed or encrypted, which torch never does"),
    "big-endian": (rezipped(RAW, byteorder=b"big"), "is not little-endian"),
    "no pickle": (rezipped(RAW, data_pkl=None), "has no data.pkl"),
    "no data": (rezipped(RAW, data_0=None), "is not a plain tensor"),
    "too little data": (rezipped(RAW, data_0=b"1234"), "has fewer bytes than its tensor needs"),
    "other dtype": (saved(VALUES.double()), r"is float64 \[4, 6\], but the metadata says float32 \[4, 6\]"),
    "other shape": (saved(VALUES.t().contiguous()), r"is float32 \[6, 4\], but the metadata says"),
    "no tensor": (saved({"a": 1, "padding": "x" * 200}), "is not a plain tensor"),
    "two tensors": (saved([VALUES, VALUES]), "is not a plain tensor"),
    "no zip": (b"x" * 2000, "was not written by torch.save"),
    "zeros": (b"\0" * 2000, "was not written by torch.save"),
}


@pytest.mark.parametrize(("raw", "said"), BAD.values(), ids=BAD)
def test_records_that_are_not_a_tensor_of_the_metadata(tmp_path, raw, said):
    with pytest.raises(CheckpointError, match=said) as failure:
        read(one(tmp_path, raw))
    assert "weight in " in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_shard_that_was_deleted_or_truncated(tmp_path):
    directory = small().write(tmp_path)
    checkpoint = open_checkpoint(directory)
    shard = directory / SHARD
    raw = shard.read_bytes()
    shard.write_bytes(raw[:100])
    with pytest.raises(CheckpointError, match="is truncated"):
        read(Reader(checkpoint), "decoder.final_layernorm.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be read: No such file"):
        read(Reader(checkpoint), "decoder.final_layernorm.weight")
