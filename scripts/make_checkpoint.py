"""Write a Megatron-LM checkpoint with Megatron's own code, from a Hugging Face Llama or Mixtral directory.

    python scripts/make_checkpoint.py --hf smollm2-768 --out ckpt
    torchrun --nproc-per-node 2 scripts/make_checkpoint.py --hf smollm2-768 --out ckpt-tp2 --tp 2
    torchrun --nproc-per-node 2 scripts/make_checkpoint.py --hf mixtral --out ckpt-ep2 --ep 2

The arguments are parsed and validated by `megatron.training.arguments`, the model is megatron-core's `GPTModel` with its
local layer spec, and `megatron.training.checkpointing.save_checkpoint` determines the file format. It runs
without a GPU: `without_cuda` replaces the few CUDA calls on that path by CPU counterparts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ITERATION = 100


def without_cuda() -> None:
    """Replace the CUDA calls that megatron-core makes unconditionally by CPU counterparts."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # rotary embedding
    torch.cuda.synchronize = lambda *_args, **_kwargs: None  # saving
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=10, minor=0)  # checks of settings for old GPUs
    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.zeros(1, dtype=torch.uint8)  # saving


def megatron_argv(config: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The command line of a training run of this model."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    argv = {
        "num-layers": config["num_hidden_layers"],
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config["intermediate_size"],
        "num-attention-heads": heads,
        "kv-channels": config.get("head_dim") or config["hidden_size"] // heads,
        "seq-length": min(config["max_position_embeddings"], 2048),
        "max-position-embeddings": config["max_position_embeddings"],
        "norm-epsilon": config["rms_norm_eps"],
        "rotary-base": int(config["rope_theta"]),
        "vocab-size": config["vocab_size"],
        "make-vocab-size-divisible-by": options.vocab_divisor,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "tensor-model-parallel-size": options.tp,
        "pipeline-model-parallel-size": options.pp,
        "expert-model-parallel-size": options.ep,
        "micro-batch-size": 1,
        "global-batch-size": options.ep,  # expert parallel ranks are data parallel ones
        "train-iters": ITERATION,
        "lr": 1e-4,
        "save-interval": ITERATION,
        "save": options.out,
        "ckpt-format": "torch_dist",
        "transformer-impl": "local",
        "distributed-backend": "gloo",
        "attention-dropout": 0,
        "hidden-dropout": 0,
    }
    if groups != heads:
        argv["num-query-groups"] = groups
    if config.get("num_local_experts"):
        argv |= {
            "num-experts": config["num_local_experts"],
            "moe-router-topk": config["num_experts_per_tok"],
            "moe-router-load-balancing-type": "none",
            "moe-token-dispatcher-type": "allgather",  # the others need CUDA streams
        }
    if (options.hf / "tokenizer.json").is_file():
        argv |= {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": options.hf.resolve()}
    else:
        argv["tokenizer-type"] = "NullTokenizer"
    flags = [
        "bf16", "swiglu", "disable-bias-linear", "use-cpu-initialization", "no-save-optim", "no-save-rng", "no-rope-fusion",
        "no-bias-swiglu-fusion", "no-bias-dropout-fusion", "no-masked-softmax-fusion", "no-persist-layer-norm",
        "no-gradient-accumulation-fusion",
        "no-initialization",
    ]  # fmt: skip
    if groups != heads:
        flags.append("group-query-attention")
    if not config["tie_word_embeddings"]:
        flags.append("untie-embeddings-and-output-weights")
    return [part for key, value in argv.items() for part in (f"--{key}", str(value))] + [f"--{flag}" for flag in flags]


def parse(argv: list[str]) -> Any:
    """Megatron's arguments, validated and made global as in its training entry point."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_args

    sys.argv = [sys.argv[0], *argv]
    with contextlib.redirect_stdout(io.StringIO()):
        args = validate_args(parse_args())
    unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // unit) * unit
    args.iteration = ITERATION
    args.consumed_train_samples = ITERATION
    set_args(args)
    return args


def initialize(args: Any) -> None:
    """Start torch.distributed and Megatron's process groups."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
    )
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def build(args: Any, layer_spec: Any = None) -> Any:
    """This rank's part of the model, as Megatron's `pretrain_gpt.py` builds it; `layer_spec` replaces the local one."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args

    return GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=layer_spec or get_gpt_layer_local_spec(args.num_experts, normalization="RMSNorm"),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    ).bfloat16()


def shard(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The part of `tensor` along `dim` on this TP rank."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return tensor.chunk(size, dim=dim)[rank]


def fill_layer(layer: Any, prefix: str, hf: dict[str, torch.Tensor], args: Any) -> None:
    """Copy one Hugging Face layer into one megatron-core layer of this rank."""
    groups = args.num_query_groups or args.num_attention_heads
    q, k, v = (
        hf[f"{prefix}.self_attn.{name}_proj.weight"].view(groups, -1, args.kv_channels, args.hidden_size) for name in "qkv"
    )
    qkv = torch.cat([q, k, v], dim=1).reshape(-1, args.hidden_size)
    layer.input_layernorm.weight.copy_(hf[f"{prefix}.input_layernorm.weight"])
    layer.self_attention.linear_qkv.weight.copy_(shard(qkv, 0))
    layer.self_attention.linear_proj.weight.copy_(shard(hf[f"{prefix}.self_attn.o_proj.weight"], 1))
    layer.pre_mlp_layernorm.weight.copy_(hf[f"{prefix}.post_attention_layernorm.weight"])
    if not args.num_experts:
        fill_mlp(layer.mlp, hf, [f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")])
        return
    layer.mlp.router.weight.copy_(hf[f"{prefix}.block_sparse_moe.gate.weight"])
    for index, expert in zip(layer.mlp.local_expert_indices, layer.mlp.experts.local_experts, strict=True):
        fill_mlp(expert, hf, [f"{prefix}.block_sparse_moe.experts.{index}.{name}.weight" for name in ("w1", "w3", "w2")])


def fill_mlp(mlp: Any, hf: dict[str, torch.Tensor], names: list[str]) -> None:
    """Copy gate, up and down, the tensors `names`, into an MLP or an expert of this rank."""
    gate, up, down = (hf[name] for name in names)
    mlp.linear_fc1.weight.copy_(torch.cat([shard(gate, 0), shard(up, 0)]))
    mlp.linear_fc2.weight.copy_(shard(down, 1))


def pad_vocabulary(table: torch.Tensor, rows: int) -> torch.Tensor:
    """`table` with zero rows appended up to `rows`, as Megatron pads a vocabulary for tensor parallelism."""
    return torch.cat([table, table.new_zeros(rows - table.shape[0], table.shape[1])])


@torch.no_grad()
def fill(model: Any, hf: dict[str, torch.Tensor], args: Any) -> None:
    """Copy the Hugging Face weights into this rank's part of the model."""
    embedding = pad_vocabulary(hf["model.embed_tokens.weight"], args.padded_vocab_size)
    if model.pre_process:
        model.embedding.word_embeddings.weight.copy_(shard(embedding, 0))
    for layer in model.decoder.layers:
        fill_layer(layer, f"model.layers.{layer.layer_number - 1}", hf, args)
    if model.post_process:
        model.decoder.final_layernorm.weight.copy_(hf["model.norm.weight"])
        if args.untie_embeddings_and_output_weights:
            head = pad_vocabulary(hf["lm_head.weight"], args.padded_vocab_size)
            model.output_layer.weight.copy_(shard(head, 0))
        elif not model.pre_process:
            model.output_layer.weight.copy_(shard(embedding, 0))


def save(model: Any, per_layer: bool = False) -> None:
    """Save the model, without the optimizer, with Megatron's own function.

    With `per_layer`, uses the layout of megatron-core's heterogeneous models: one key per layer, gated fc1 in two.
    """
    from megatron.training import checkpointing

    if per_layer:
        model.config.hetereogenous_dist_checkpoint = True
        build_metadata = checkpointing._build_sharded_state_dict_metadata
        checkpointing._build_sharded_state_dict_metadata = lambda *args, **kwargs: (
            build_metadata(*args, **kwargs) | {"singleton_local_shards": True}
        )
    with contextlib.redirect_stdout(sys.stderr):
        checkpointing.save_checkpoint(ITERATION, [model], None, None, 0)


def load_config(folder: Path) -> dict[str, Any]:
    """The config of a Hugging Face directory."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    fields: dict[str, Any] = config.to_dict()
    fields["rope_theta"] = fields.get("rope_theta") or config.rope_parameters["rope_theta"]
    return fields


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a Hugging Face directory, memory-mapped."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def stand_alone() -> None:
    """Set up a process group of one in a process that was not started by torchrun."""
    if "RANK" not in os.environ:
        port = torch.randint(20000, 60000, ()).item()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def main() -> None:
    """Parse, build, fill and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face Llama or Mixtral directory")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint root to write")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (with torchrun)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (with torchrun)")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size (with torchrun)")
    parser.add_argument("--vocab-divisor", type=int, default=128, help="pad the vocabulary to a multiple of this times TP")
    parser.add_argument("--per-layer", action="store_true", help="one key per layer instead of stacked layers")
    options = parser.parse_args()

    without_cuda()
    stand_alone()
    args = parse(megatron_argv(load_config(options.hf), options))
    initialize(args)
    model = build(args)
    fill(model, load_weights(options.hf), args)
    save(model, options.per_layer)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", scratch)
        main()
