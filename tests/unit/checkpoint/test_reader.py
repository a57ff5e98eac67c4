import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from mptq.checkpoint import reader
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.checkpoint.torch_zip import open_record
from mptq.errors import CheckpointError


def whole(checkpoint, name):
    """Reads the tensor with torch's own loader."""
    spec = checkpoint.tensors[name].spec
    state = {name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))}
    load(state, storage_reader=FileSystemReader(checkpoint.directory), no_dist=True)
    return state[name]


@pytest.mark.parametrize("name", ["decoder.layers.mlp.linear_fc1.weight", "decoder.layers.self_attention.linear_qkv.weight"])
def test_one_layer_of_a_stack(aligned, name):
    checkpoint = open_checkpoint(aligned)
    ours, expected = Reader(checkpoint), whole(checkpoint, name)
    for layer in range(4):
        out = torch.empty(expected.shape[1:], dtype=expected.dtype)
        assert torch.equal(ours.read(name, out, (layer,)), expected[layer])
    half = ours.read(name, torch.empty(expected.shape[1:], dtype=torch.float32), (2,))
    assert torch.equal(half, expected[2].float())


def test_whole_tensor(aligned):
    checkpoint = open_checkpoint(aligned)
    name = "embedding.word_embeddings.weight"
    expected = whole(checkpoint, name)
    assert torch.equal(Reader(checkpoint).read(name, torch.empty_like(expected)), expected)


def test_only_the_layers_bytes_are_read(aligned, monkeypatch):
    checkpoint = open_checkpoint(aligned)
    name = "decoder.layers.mlp.linear_fc2.weight"
    read = []
    monkeypatch.setattr(reader, "open_record", lambda *args: read.append(args[2]) or open_record(*args))
    Reader(checkpoint).read(name, torch.empty(256, 384), (3,))
    chunk = next(chunk for chunk in checkpoint.tensors[name].chunks if chunk.offsets[0] == 3)
    assert read == [chunk.record.offset]


def test_damaged_record_names_tensor_and_file(aligned, tmp_path):
    root = shutil.copytree(aligned, tmp_path / "ckpt")
    checkpoint = open_checkpoint(root)
    name = "decoder.layers.mlp.linear_fc2.weight"
    record = checkpoint.tensors[name].chunks[0].record
    with (checkpoint.directory / record.file).open("r+b") as file:
        file.seek(record.offset)
        file.write(b"\0" * 64)
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight in .*__0_0\.distcp"):
        Reader(checkpoint).read(name, torch.empty(256, 384), (0,))
