"""Throughput of quantizing one matrix and measuring its error, against ModelOpt's whole-matrix path, as a Markdown table.

    python scripts/bench_strips.py [--rows 22016] [--columns 4096] [--runs 3]

GB are of the BF16 source. The contenders run in turn in one process; both give the same bytes, which is checked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch

from mptq.quantize import strips
from mptq.quantize.fp8 import decode, weight_error
from mptq.quantize.modelopt import quantize_weight
from mptq.recipe import Scheme
from mptq.types import Fp8Weight


def by_modelopt(weight: torch.Tensor, scheme: Scheme) -> Fp8Weight:
    """ModelOpt's conversion of the whole matrix in float32, and then its error."""
    made = quantize_weight(weight.float(), scheme, "weight")
    weight_error(weight, made, scheme)
    return made


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=22016)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(options.rows, options.columns).bfloat16()
    print(f"{os.cpu_count()} cores; torch {version('torch')}, nvidia-modelopt {version('nvidia-modelopt')}\n")
    print("| BF16 source, GB a second | strips | ModelOpt and the error | ratio |\n|---|---|---|---|")
    for name in ("block", "row", "tensor", "mx"):
        scheme = Scheme(name)
        ours, theirs = strips.quantize(weight, scheme, "weight")[0], by_modelopt(weight, scheme)
        assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
        assert torch.equal(ours.scale, theirs.scale)
        contenders = [partial(strips.quantize, weight, scheme, "weight"), partial(by_modelopt, weight, scheme)]
        times = [[seconds(work) for work in contenders] for _ in range(options.runs)]
        one, other = (weight.nbytes / 1e9 / statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {one:.2f} | {other:.2f} | {one / other:.1f} |", flush=True)
    data = torch.randn(128, 4096).to(torch.float8_e4m3fn)
    out, bits = torch.empty(data.shape), torch.empty(data.shape, dtype=torch.int16)
    cast = statistics.median(seconds(lambda: out.copy_(data)) for _ in range(50))
    ours_cast = statistics.median(seconds(lambda: decode(data, out, bits)) for _ in range(50))
    print("\n0.5 M elements from FP8 to float32:", end=" ")
    print(f"torch's cast {cast * 1e3:.2f} ms, through float16's bits {ours_cast * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
