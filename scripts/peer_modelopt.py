"""Quantize without mptq: load the whole Megatron model, quantize and compress it with ModelOpt, and save it with Megatron.

python scripts/peer_modelopt.py HF_DIR CKPT OUT        # HF_DIR is used only for the training arguments; the weights are CKPT's
"""

from __future__ import annotations

import argparse
from pathlib import Path

import make_checkpoint
import torch


def main() -> None:
    """Load, quantize, compress, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hf", "checkpoint", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    make_checkpoint.without_cuda()
    make_checkpoint.stand_alone()
    settings = argparse.Namespace(hf=options.hf, out=options.out, tp=1, pp=1, ep=1, vocab_divisor=128)
    args = make_checkpoint.parse(make_checkpoint.megatron_argv(make_checkpoint.load_config(options.hf), settings))
    make_checkpoint.initialize(args)
    model = make_checkpoint.build(args)

    import modelopt.torch.quantization as mtq
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state

    iteration = f"iter_{make_checkpoint.ITERATION:07d}"
    model.load_state_dict(
        dist_checkpointing.load(model.sharded_state_dict(), str(options.checkpoint / iteration)), strict=False
    )
    with torch.no_grad():
        mtq.quantize(model, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)
        mtq.compress(model)
    make_checkpoint.save(model)
    save_sharded_modelopt_state([model], options.out / iteration)


if __name__ == "__main__":
    main()
