"""Write the metadata of a trillion-parameter mixture of experts, as megatron-core 0.19 writes it, over empty shard files.

    python scripts/make_metadata.py --out trillion

The sizes are those of a public model of 61 layers and 384 experts, with a dense first layer. There is one key per
layer; the experts of a layer are one tensor in chunks by expert (gate and up separate), attention is in chunks by
tensor-parallel rank, Adam's two moments and the master weights are chunked like the weights, and every linear of every
expert has Transformer Engine's byte item. Only `.metadata` and the training arguments are stored: the shard files are
sparse, with their full lengths.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

HIDDEN, LAYERS, EXPERTS, EXPERT_FFN, FFN, VOCABULARY, HEADS = 7168, 61, 384, 2048, 18432, 163840, 64
OVERHEAD = 1300  # bytes of a `torch.save` file of one tensor in addition to its data
ARGS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "moe_ffn_hidden_size": EXPERT_FFN,
    "num_experts": EXPERTS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 131072,
    "norm_epsilon": 1e-6,
    "rotary_base": 50000,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "qk_layernorm": True,
    "add_bias_linear": False,
    "moe_layer_freq": [0, *[1] * (LAYERS - 1)],
    "moe_shared_expert_intermediate_size": EXPERT_FFN,
    "moe_router_score_function": "sigmoid",
    "moe_router_topk": 8,
    "untie_embeddings_and_output_weights": True,
    "tensor_model_parallel_size": 8,
    "pipeline_model_parallel_size": 16,
    "expert_model_parallel_size": 64,
}


class Writer:
    """The metadata entries that the ranks would have written, spread over the shard files."""

    def __init__(self, ranks: int) -> None:
        self.tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self.plans = [SavePlan([]) for _ in range(ranks)]
        self.ends = dict.fromkeys(range(ranks), 0)
        self.turns = itertools.cycle(range(ranks))

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
        """Add a tensor split into a grid of equal chunks."""
        sizes = tuple(size // parts for size, parts in zip(shape, grid, strict=True))
        entry = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [])
        for place in itertools.product(*map(range, grid)):
            offset = torch.Size(number * size for number, size in zip(place, sizes, strict=True))
            chunk = ChunkStorageMetadata(offset, torch.Size(sizes))
            data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(shape))
            index = MetadataIndex(name, offset, len(entry.chunks))
            self.place(WriteItem(index, WriteItemType.SHARD, tensor_data=data), math.prod(sizes) * dtype.itemsize + OVERHEAD)
            entry.chunks.append(chunk)
        self.tensors[name] = entry

    def blob(self, name: str, length: int) -> _StorageInfo:
        """Add a byte item."""
        self.tensors[name] = BytesStorageMetadata()
        return self.place(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), length)

    def place(self, item: WriteItem, length: int) -> _StorageInfo:
        """Allocate the next bytes of the next rank's file."""
        rank = next(self.turns)
        info = _StorageInfo(f"__{rank}_0.distcp", self.ends[rank], length)
        self.ends[rank] += length
        self.storage[MetadataIndex(item.index.fqn, item.index.offset)] = info
        self.plans[rank].items.append(item)
        return info


def weights() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, shape and chunk grid of every parameter."""
    yield "embedding.word_embeddings.weight", (VOCABULARY, HIDDEN), (8, 1)
    yield "output_layer.weight", (VOCABULARY, HIDDEN), (8, 1)
    yield "decoder.final_layernorm.weight", (HIDDEN,), (1,)
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        attention = prefix + "self_attention."
        yield prefix + "input_layernorm.weight", (HIDDEN,), (1,)
        yield attention + "linear_q_down_proj.weight", (1536, HIDDEN), (1, 1)
        yield attention + "linear_q_up_proj.layer_norm_weight", (1536,), (1,)
        yield attention + "linear_q_up_proj.weight", (HEADS * 192, 1536), (8, 1)
        yield attention + "linear_kv_down_proj.weight", (576, HIDDEN), (1, 1)
        yield attention + "linear_kv_up_proj.layer_norm_weight", (512,), (1,)
        yield attention + "linear_kv_up_proj.weight", (HEADS * 256, 512), (8, 1)
        yield attention + "linear_proj.weight", (HIDDEN, HEADS * 128), (1, 8)
        if layer == 0:
            yield prefix + "mlp.linear_fc1.layer_norm_weight", (HIDDEN,), (1,)
            yield prefix + "mlp.linear_fc1.weight", (2 * FFN, HIDDEN), (16, 1)
            yield prefix + "mlp.linear_fc2.weight", (HIDDEN, FFN), (1, 8)
            continue
        yield prefix + "pre_mlp_layernorm.weight", (HIDDEN,), (1,)
        yield prefix + "mlp.router.weight", (EXPERTS, HIDDEN), (1, 1)
        yield prefix + "mlp.shared_experts.linear_fc1.weight", (2 * EXPERT_FFN, HIDDEN), (16, 1)
        yield prefix + "mlp.shared_experts.linear_fc2.weight", (HIDDEN, EXPERT_FFN), (1, 8)
        experts = prefix + "mlp.experts.experts."
        yield experts + "linear_fc1.weight", (EXPERTS, 2 * EXPERT_FFN, HIDDEN), (EXPERTS, 2, 1)
        yield experts + "linear_fc2.weight", (EXPERTS, HIDDEN, EXPERT_FFN), (EXPERTS, 1, 1)


def build(writer: Writer) -> dict[str, int]:
    """Add every entry; return the numbers of parameters and entries."""
    total = 0
    for name, shape, grid in weights():
        total += math.prod(shape)
        writer.tensor(name, torch.bfloat16, shape, grid)
        for state in ("exp_avg", "exp_avg_sq", "fp32_param"):
            writer.tensor(f"optimizer.state.{state}.{name}", torch.float32, shape, grid)
    for layer in range(1, LAYERS):
        for expert, linear in itertools.product(range(EXPERTS), ("linear_fc1", "linear_fc2")):
            owner = f"decoder.layers.{layer}.mlp.experts.experts.{linear}"
            writer.blob(f"{owner}._extra_state/shard_{expert}_{EXPERTS}", OVERHEAD)
    return {"parameters": total, "entries": len(writer.storage)}


def main() -> None:
    """Write the metadata and the empty shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint root to write")
    parser.add_argument("--ranks", type=int, default=1024, help="number of ranks, each with one shard file")
    options = parser.parse_args()

    writer = Writer(options.ranks)
    found = build(writer)
    common = io.BytesIO()
    torch.save([{"args": Namespace(**ARGS), "iteration": 100}], common)
    place = writer.blob("common_state/shard_0_1", len(common.getvalue()))
    directory = options.out / "iter_0000100"
    directory.mkdir(parents=True)
    for rank, end in writer.ends.items():
        with (directory / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(end)
    with (directory / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(common.getvalue())
    metadata = Metadata(writer.tensors, storage_data=writer.storage)
    # megatron-core stores the plans of all ranks there, to compare them with those of the next save.
    metadata.all_local_plans = writer.plans  # type: ignore[attr-defined]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (options.out / "latest_checkpointed_iteration.txt").write_text("100")
    size = (directory / ".metadata").stat().st_size
    print(f"{found['parameters']:,} parameters, {found['entries']:,} entries, {size / 1e6:.1f} MB of metadata")


if __name__ == "__main__":
    main()
