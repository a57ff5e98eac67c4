"""Checks of the models that other tests are built on: the tensors are the same in every layout."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.support.zoo import ZOO, observed

pytestmark = pytest.mark.slow


def tensors(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, unsharded."""
    reader = FileSystemReader(next((folder / "ckpt").glob("iter_*")))
    found = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.parametrize("name", ZOO)
def test_every_model_has_a_checkpoint_and_logits(zoo, name):
    found, saved = observed(zoo(name)), tensors(zoo(name))
    ids, logits, hidden = found["ids"], found["logits"], found["hidden"]
    assert ids.shape == (4, ZOO[name].length)
    assert logits.shape == (*ids.shape, 500)
    assert hidden.shape[1:] == (*ids.shape, 256)
    assert logits.isfinite().all()
    assert logits.dtype == hidden.dtype == torch.float32
    assert saved["embedding.word_embeddings.weight"].shape == (512, 256)
    other = {key: tensor.dtype for key, tensor in saved.items() if tensor.dtype != torch.bfloat16}
    assert all(key.endswith("expert_bias") and dtype == torch.float32 for key, dtype in other.items())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt", {"pp": 2}),
        ("qwen2-moe", {"ep": 2}),
        ("deepseek-v3-mtp", {"tp": 2}),
    ],
)
def test_every_layout_has_the_same_tensors(zoo, name, layout):
    one, other = tensors(zoo(name)), tensors(zoo(name, **layout))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_one_key_per_layer_holds_the_same_tensors(zoo):
    one, other = tensors(zoo("llama")), tensors(zoo("llama", per_layer=True))
    gate, up = (other[f"decoder.layers.1.mlp.linear_fc1.weight_{half}"] for half in "wv")
    assert torch.equal(one["decoder.layers.mlp.linear_fc1.weight"][1], torch.cat([gate, up]))
    key = "self_attention.linear_qkv.weight"
    assert torch.equal(one[f"decoder.layers.{key}"][1], other[f"decoder.layers.1.{key}"])
