"""Configs that megatron-core itself builds from command lines: run by tests in a separate process.

    python tests/support/megatron_configs.py CASES.json OUT

CASES.json maps names to argument lists. For each, OUT/NAME.pt is the parsed and validated Namespace as a checkpoint stores
it, OUT/NAME.yaml is a run config as Megatron-Bridge writes it (with megatron-core's own representers), and OUT/NAME.json has
the fields of the TransformerConfig and of the GPTModelConfig that Megatron-LM builds from it, the sizes of its tokenizer, and,
if the name begins with "model-", the keys and shapes under which megatron-core stores the tensors of that model.
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from make_checkpoint import initialize, parse, stand_alone, without_cuda

PLAIN = bool | int | float | str


class NoAttention(torch.nn.Module):
    """A core attention without parameters: the local one does not support the sizes of multi-latent attention."""

    def __init__(self, *_args, **_kwargs):
        super().__init__()


def plain(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(value):
        return getattr(value, "__name__", repr(value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, PLAIN) else repr(value)


def shapes(args, config) -> dict:
    """Keys and global shapes of the tensors of this model in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    if not torch.distributed.is_initialized():
        stand_alone()
        initialize(args)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = NoAttention
    model = GPTModel(
        config,
        block,
        args.padded_vocab_size,
        args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        mtp_block_spec=get_gpt_mtp_block_spec(config, block, use_transformer_engine=False) if args.mtp_num_layers else None,
    )
    state = model.sharded_state_dict()
    apply_factories(state)
    return {item.key: list(item.global_shape) for item in nested_values(state) if isinstance(item, ShardedTensor)}


def main(cases: Path, out: Path) -> None:
    without_cuda()
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
    from megatron.training.config.yaml_utils import safe_yaml_representers

    for name, argv in json.loads(cases.read_text()).items():
        args = parse(argv)
        torch.save({"args": args}, out / f"{name}.pt")
        with contextlib.redirect_stdout(io.StringIO()):
            config = core_transformer_config_from_args(args)
            model = gpt_config_from_args(args, config)
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        yarn = {key: value for key, value in vars(config).items() if key.startswith("yarn_")}
        outer = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name != "transformer"}
        found = {
            "transformer": {key: plain(value) for key, value in (fields | yarn).items()},
            "gpt": {key: plain(value) for key, value in outer.items()},
        }
        tokenizer = build_tokenizer(args)
        found["tokenizer"] = {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}
        provider = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", **fields, **yarn, **outer}
        with safe_yaml_representers():
            (out / f"{name}.yaml").write_text(yaml.safe_dump({"model": provider}))
        if name.startswith("model-"):
            found["shapes"] = shapes(args, config)
        (out / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
