"""Build models of tests/support/zoo.py with megatron-core alone, save them with it, and save their logits and hidden states.

    python -m tests.support.build_zoo llama qwen2 --out DIR
    torchrun --nproc-per-node 2 -m tests.support.build_zoo llama qwen2 --out DIR --tp 2

DIR/NAME/ckpt is the checkpoint, in BF16, and DIR/NAME/logits.pt has the results of the same weights in float32: "ids" int64
[4, length], "logits" [4, length, vocabulary] without the padding, and "hidden" [layers + 1, 4, length, hidden], the
embeddings and the output of each layer; for latent attention also "cached" [layers, 2], the largest magnitudes of what
engines cache. With more than one process the same tensors are saved, but no logits.

Every model is checked for sensitivity to a mistake: one head rotated wrongly.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # megatron-core compiles its small functions, which takes minutes on a CPU

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import make_checkpoint

from tests.support import zoo_mamba
from tests.support.zoo import COMMON, ZOO
from tests.support.zoo_checks import OnCpu, cached_latents, check_sensitive, observe, sentences
from tests.support.zoo_models import build
from tests.support.zoo_weights import fill, name_as_te, to_bfloat16


def arguments(row, out, options):
    """The validated arguments of the training run of `row`."""
    layout = (
        f"--tensor-model-parallel-size {options.tp} --pipeline-model-parallel-size {options.pp} "
        f"--expert-model-parallel-size {options.ep} --global-batch-size {options.ep} --save {out}"
    )
    return make_checkpoint.parse(f"{COMMON} {row.argv} {layout}".split())


def make(name, options):
    """Build, fill, observe and save the model called `name`."""
    row, folder = ZOO[name], options.out / name
    folder.mkdir(parents=True, exist_ok=True)  # in each process
    args = arguments(row, folder / "ckpt", options)
    if not torch.distributed.is_initialized():
        make_checkpoint.initialize(args)
    with OnCpu():
        model = build(args, row)
    fill(model, args, row)
    if options.tp * options.pp * options.ep == 1:
        ids = sentences(model, row)
        logits, hidden = observe(model, ids)
        found = check_sensitive(model, ids, logits)
        seen = {"cached": cached_latents(model, ids)} if args.multi_latent_attention else {}
        torch.save({"ids": ids, "logits": logits, "hidden": hidden} | seen, folder / "logits.pt")
        print(f"{name}: KL of a mistake with one head {found:.3g}, logits' deviation {logits.std():.3g}")
    to_bfloat16(model)
    if row.te:
        name_as_te(model)
    make_checkpoint.save(model, options.per_layer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=ZOO)
    parser.add_argument("--out", type=Path, required=True, help="directory in which a folder per name is created")
    for kind in ("tp", "pp", "ep"):
        parser.add_argument(f"--{kind}", type=int, default=1, help="parallel size (with torchrun)")
    parser.add_argument("--per-layer", action="store_true", help="one key per layer instead of stacked layers")
    options = parser.parse_args()
    make_checkpoint.without_cuda()
    make_checkpoint.stand_alone()
    with zoo_mamba.installed():
        for name in options.names:
            make(name, options)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
