import pickle
import shutil

import pytest

from mptq.checkpoint.index import open_checkpoint, read_blob
from mptq.checkpoint.torch_zip import load_torch_file
from mptq.errors import CheckpointError

DIRECTORY = "iter_0000100"


@pytest.fixture
def copy(aligned, tmp_path):
    return shutil.copytree(aligned, tmp_path / "ckpt")


def test_index_of_megatrons_own_checkpoint(aligned):
    checkpoint = open_checkpoint(aligned)
    qkv = checkpoint.tensors["decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv.spec.shape == (4, 1024, 256)
    assert qkv.spec.dtype == "bfloat16"
    assert [chunk.offsets[0] for chunk in qkv.chunks] == [0, 1, 2, 3]
    assert checkpoint.args["ffn_hidden_size"] == 384
    assert checkpoint.args_source == "args in common_state"
    assert "common_state/shard_0_1" in checkpoint.blobs
    assert len(checkpoint.fingerprint) == 64


def test_arguments_in_common_pt(copy):
    """megatron-core 0.16 and earlier store them in a separate file."""
    checkpoint = open_checkpoint(copy)
    record = checkpoint.blobs["common_state/shard_0_1"]
    raw = read_blob(checkpoint.directory, record)
    state = load_torch_file(checkpoint.directory / record.file, "item", record)[0]
    assert "args" in state
    import io

    import torch

    with torch.serialization.safe_globals([]):
        loaded = torch.load(io.BytesIO(raw), weights_only=False)[0]  # our own test file
    torch.save(loaded, copy / DIRECTORY / "common.pt")
    again = open_checkpoint(copy)
    assert again.args_source == "args in common.pt"
    assert again.args["ffn_hidden_size"] == 384


def test_missing_shard(copy):
    next((copy / DIRECTORY).glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        open_checkpoint(copy)


def test_truncated_shard(copy):
    shard = next((copy / DIRECTORY).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is truncated"):
        open_checkpoint(copy)


def test_truncated_metadata(copy):
    metadata = copy / DIRECTORY / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a readable pickle"):
        open_checkpoint(copy)


def test_pickle_of_something_else(copy):
    (copy / DIRECTORY / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="is not the metadata of a torch_dist checkpoint"):
        open_checkpoint(copy)


def edit_metadata(copy, change):
    """Changes the metadata by unpickling and pickling it with torch (the file is our own)."""
    path = copy / DIRECTORY / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_missing_chunk(copy):
    edit_metadata(copy, lambda m: m.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop())
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight \[4, 256, 384\] has chunks for 294912 of 393216"):
        open_checkpoint(copy)


def test_shard_outside_the_checkpoint(copy):
    def escape(metadata):
        next(iter(metadata.storage_data.values())).relative_path = "../../../etc/passwd"

    edit_metadata(copy, escape)
    with pytest.raises(CheckpointError, match="which is outside the checkpoint"):
        open_checkpoint(copy)
