"""Measure the fidelity of ModelOpt's own quantization of a whole Megatron model, next to the metrics in mptq's report.

    python scripts/fidelity_modelopt.py HF_DIR CKPT OUT --config FP8_DEFAULT_CFG      # HF_DIR for the training arguments

megatron-core's GPTModel with the checkpoint's weights, in BF16 on the CPU, is quantized by `mtq.quantize` with one of
ModelOpt's own configs and calibrated (max) on the tokens of the run that wrote OUT, and then converted to real FP8
weights by `mtq.compress`. KL divergence and perplexities are measured on the same held-out tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import figures
import make_checkpoint
import torch


def load(options: argparse.Namespace) -> Any:
    """The GPTModel with the checkpoint's weights."""
    from megatron.core import dist_checkpointing

    settings = argparse.Namespace(hf=options.hf, out=Path("unused"), tp=1, pp=1, ep=1, vocab_divisor=128)
    args = make_checkpoint.parse(make_checkpoint.megatron_argv(make_checkpoint.load_config(options.hf), settings))
    make_checkpoint.initialize(args)
    model = make_checkpoint.build(args).eval()
    directory = options.checkpoint / f"iter_{make_checkpoint.ITERATION:07d}"
    found = model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(directory)), strict=False)
    assert not [key for key in found.missing_keys if not key.endswith("_extra_state")]
    return model


@torch.no_grad()
def logits(model: Any, sequences: list[torch.Tensor], vocabulary: int) -> list[torch.Tensor]:
    """Logits [length, vocabulary] of each sequence, without the padding of the vocabulary."""
    found = []
    for ids in sequences:
        length = len(ids)
        mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        found.append(model(ids[None], torch.arange(length)[None], mask)[0, :, :vocabulary])
    return found


def main() -> None:
    """Print a table: the report's metrics, and those of ModelOpt's fake quantization and compressed model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hf", "checkpoint", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--config", required=True, help="name of a ModelOpt config")
    parser.add_argument("--calib-dataset", action="append", default=[], help="the same as in the run")
    options = parser.parse_args()
    report = figures.read_report(options.out)
    figures.fast_bfloat16()
    vocabulary = report["model"]["vocab_size"]
    make_checkpoint.without_cuda()
    make_checkpoint.stand_alone()
    model = load(options)
    import modelopt.torch.quantization as mtq

    config = getattr(mtq, options.config)
    calibrates = bool(report["calibration"]["calibration"]["sequences"])
    held_out, calibration = figures.tokens(report, options.hf, options.calib_dataset, calibrates)
    reference = logits(model, held_out, vocabulary)
    print(figures.HEADER)
    print(figures.report_row(f"{options.out.name}, mptq", report))
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        mtq.quantize(model, config, lambda inner: logits(inner, calibration, vocabulary) if calibration else None)
        mtq.print_quant_summary(model)
    for step in ("fake", "compressed"):
        if step == "compressed":
            with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
                mtq.compress(model)
        found = figures.measure(held_out, reference, logits(model, held_out, vocabulary))
        print(found.row(f"{options.out.name}, ModelOpt's {options.config}, {step}", report), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
