"""Measure the throughput of quantizing one matrix, errors included, against ModelOpt on the whole matrix, as a Markdown table.

    python scripts/bench_strips.py [--rows 22016] [--columns 4096] [--runs 3]

GB refer to the BF16 source. The contenders run interleaved in one process; the script checks that both give the same bytes.
ModelOpt's time is for the quantized tensor of the float32 matrix, without measuring errors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor

from mptq.quantize import quantizer
from mptq.recipes.schemes import SCHEMES

ARGUMENTS: dict[str, dict[str, Any]] = {"block": {"block_sizes": {-1: 128, -2: 128}}, "row": {"axis": 0}, "tensor": {}}
"""Kind of scale -> arguments of ModelOpt."""


def by_modelopt(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ModelOpt's conversion of the whole matrix in float32: (FP8 bytes, scales)."""
    made, scale = FP8QTensor.quantize(weight.float(), **ARGUMENTS[kind])
    return made._quantized_data.view(torch.uint8), scale


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=22016)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(options.rows, options.columns).bfloat16()
    print(f"{os.cpu_count()} cores; torch {version('torch')}, nvidia-modelopt {version('nvidia-modelopt')}\n")
    print("| BF16 source, GB/s | strips, with the error | ModelOpt | ratio |\n|---|---|---|---|")
    for name in ARGUMENTS:
        scheme = SCHEMES[name]
        ours, (data, scale) = quantizer.quantize(weight, scheme, "weight")[0], by_modelopt(weight, name)
        assert torch.equal(ours.data.view(torch.uint8), data)
        assert torch.equal(ours.scale.flatten(), scale.flatten())
        contenders = [partial(quantizer.quantize, weight, scheme, "weight"), partial(by_modelopt, weight, name)]
        times = [[seconds(work) for work in contenders] for _ in range(options.runs)]
        one, other = (weight.nbytes / 1e9 / statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {one:.2f} | {other:.2f} | {one / other:.1f} |", flush=True)


if __name__ == "__main__":
    main()
