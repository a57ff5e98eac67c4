import itertools
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mptq.formats.hf.safetensors_stream import ShardFile, assign_shards
from mptq.output.disk import PIECE_BYTES
from mptq.types import TensorSpec

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "uint8"]
shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)
specs = st.dictionaries(st.text("abz._19", min_size=1, max_size=6), st.tuples(st.sampled_from(DTYPES), shapes), min_size=1)


def fill(spec, seed):
    torch.manual_seed(seed)
    return torch.randint(0, 100, spec.shape).to(getattr(torch, spec.dtype))


@given(specs, st.randoms())
def test_same_bytes_as_the_library_in_any_order(tmp_path_factory, entries, random):
    folder = tmp_path_factory.mktemp("st")
    announced = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in entries.items()]
    tensors = {spec.name: fill(spec, index) for index, spec in enumerate(announced)}
    random.shuffle(announced)
    shard = ShardFile(folder / "ours", announced)
    for spec in random.sample(announced, len(announced)):
        assert not shard.complete
        shard.write(spec.name, tensors[spec.name])
    assert shard.complete
    shard.close()
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_library_reads_the_file(tmp_path):
    weight = torch.randn(3, 5).to(torch.float8_e4m3fn)
    shard = ShardFile(tmp_path / "x", [TensorSpec("w", "float8_e4m3fn", (3, 5)), TensorSpec("s", "float32", (1, 1))])
    shard.write("w", weight)
    shard.write("s", torch.tensor([[0.5]]))
    shard.close()
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_tensor("w").view(torch.uint8), weight.view(torch.uint8))
        assert file.get_tensor("s").item() == 0.5


def test_rows_can_be_written_in_any_order(tmp_path):
    weight = torch.randn(5, 3).bfloat16()
    shard = ShardFile(tmp_path / "x", [TensorSpec("w", "bfloat16", (5, 3)), TensorSpec("v", "uint8", (1,))])
    shard.write("v", torch.ones(1, dtype=torch.uint8))
    for first, rows in ((3, 2), (0, 1), (1, 2)):
        assert not shard.complete
        shard.write("w", weight[first : first + rows], first)
    assert shard.complete
    shard.close()
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_tensor("w"), weight)


def test_a_tensor_must_match_its_spec(tmp_path):
    shard = ShardFile(tmp_path / "x", [TensorSpec("w", "float32", (2, 2))])
    with pytest.raises(AssertionError):
        shard.write("w", torch.ones(2, 3))
    with pytest.raises(AssertionError):
        shard.write("w", torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(AssertionError):
        shard.write("w", torch.ones(1, 2), 2)


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 100))
def test_shards_keep_order_and_size(sizes, limit):
    announced = [TensorSpec(str(index), "uint8", (size,)) for index, size in enumerate(sizes)]
    shards = assign_shards(announced, limit)
    assert [spec for shard in shards for spec in shard] == announced
    for shard in shards:
        assert len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit
    for left, right in itertools.pairwise(shards):
        assert sum(spec.nbytes for spec in left) + right[0].nbytes > limit


def test_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    counts, pwrite = [], os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, data, offset: counts.append(len(data)) or pwrite(descriptor, data, offset)
    )
    tensor = torch.randint(0, 255, (5, PIECE_BYTES // 2 + 3), dtype=torch.uint8)
    file = ShardFile(tmp_path / "file", [TensorSpec("t", "uint8", tuple(tensor.shape))])
    file.write("t", tensor)
    file.close()
    assert max(counts) == PIECE_BYTES
    assert torch.equal(load_file(tmp_path / "file")["t"], tensor)
