"""Measure the forward passes of the fidelity metrics in FLOP/s, against float32 products of the same shapes.

    python scripts/bench_forward.py CKPT [--sequences 8] [--length 512] [--recipe fp8-blockwise]

The FLOP count covers the products of the linears and of the output layer, for each stream (2 * parameters * tokens):
reference, quantized, and as Blackwell serves it if the recipe has float32 block scales. The time also includes attention,
norms and the comparison of logits. The plain products are those of one layer's linears, multiplied by the number of
layers, and of the output layer. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions


def plain(shapes: list[tuple[int, int]], tokens: int) -> float:
    """Seconds to multiply `tokens` rows by matrices of these shapes, each the best of three."""
    total = 0.0
    for rows, columns in shapes:
        weight, states = torch.randn(rows, columns), torch.randn(tokens, columns)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.linear(states, weight)
            best = min(best, time.perf_counter() - start)
        total += best
    return total


def main() -> None:
    """Run, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipe", default="fp8-blockwise")
    options = parser.parse_args()
    plan = make_plan(options.checkpoint, options.recipe)
    tokens = options.sequences * options.length
    with tempfile.TemporaryDirectory() as folder:
        data = DataOptions(eval_size=options.sequences, unseen_size=0, seq_length=options.length)
        report = run(plan, Path(folder) / "out", Options(device="cpu", data=data))
    seconds, streams = report["seconds"]["forward"], 3 if report["fidelity"]["served"] else 2
    layers = [[linear.shape for linear in plan.linears(layer)] for layer in range(plan.model.num_layers)]
    head = (plan.model.vocab_size, plan.model.hidden_size)
    flop = streams * 2 * tokens * sum(math.prod(shape) for shapes in [*layers, [head]] for shape in shapes)
    some = min(tokens, 1024)
    wanted = streams * (plain(layers[0], tokens) * len(layers) + plain([head], some) * tokens / some)
    print(f"{os.cpu_count()} cores; mptq {version('mptq')}, torch {version('torch')}; {tokens} tokens, {streams} streams\n")
    print("| | seconds | GFLOP/s |\n|---|---|---|")
    print(f"| forward passes and comparison | {seconds:.1f} | {flop / seconds / 1e9:.0f} |")
    print(f"| plain float32 products of the same shapes | {wanted:.1f} | {flop / wanted / 1e9:.0f} |")
    print(f"| ratio | {seconds / wanted:.2f} | |")


if __name__ == "__main__":
    main()
