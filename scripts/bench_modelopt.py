"""Measure what ModelOpt costs around the arithmetic: its import, and the conversion of linears without weights.

    python scripts/bench_modelopt.py [--linears 768] [--runs 3]

Imports are timed in processes of their own, with and without the garbage collector.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

IMPORT = """
import gc, time, torch, warnings
warnings.simplefilter("ignore")
{}
start = time.perf_counter()
import modelopt.torch.quantization
print(time.perf_counter() - start)
"""


def imported(before: str) -> float:
    """Seconds of ModelOpt's import after torch's, in a new process."""
    done = subprocess.run([sys.executable, "-c", IMPORT.format(before)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def converted(scheme: str, count: int) -> float:
    """Milliseconds per linear."""
    import torch

    from mptq.quantize.compressed_linears import CompressedLinears
    from mptq.recipes.schemes import SCHEMES

    names = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(count)]
    start = time.perf_counter()
    CompressedLinears(dict.fromkeys(names, (2048, 7168)), dict.fromkeys(names, SCHEMES[scheme]), torch.bfloat16)
    return 1000 * (time.perf_counter() - start) / count


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--linears", type=int, default=768)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    for words, before in (("collecting garbage", ""), ("not collecting garbage", "gc.disable()")):
        print(f"import, {words}: {statistics.median(imported(before) for _ in range(given.runs)):.2f} s")
    converted("row", 10)
    for scheme in ("row", "tensor", "block", "mx"):
        spent = statistics.median(converted(scheme, given.linears) for _ in range(given.runs))
        print(f"conversion, {scheme}: {spent:.2f} ms a linear")


if __name__ == "__main__":
    main()
