"""Measure what rounding by the inputs gives for a model, or what it takes for one matrix.

    python scripts/bench_rounding.py --work DIR CKPT...     # a table for each checkpoint; a process for each row
    python scripts/bench_rounding.py [--device cuda] [--rows 4096] [--columns 4096] [--tokens 28672]

Without checkpoints: the second moment of the inputs, the search for the scales of 128x128 blocks, and GPTQ, each after a
first run, beside a float32 product of the same size. With checkpoints: the KL divergence of each method on held-out text of
the default data and on a kind that never calibrates, and its ratio to rounding to nearest, with the errors of both.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mptq.calibration.linear_inputs import Inputs
from mptq.calibration.moments import Batches, moments
from mptq.distributed import Ranks
from mptq.quantize import quantizer
from mptq.quantize.fp8 import element_scales
from mptq.quantize.rounding.gptq import damped, factored, solve
from mptq.quantize.rounding.scales import search
from mptq.recipes.schemes import SCHEMES
from mptq.report.formatting import uncertain

BLOCK = SCHEMES["block"]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time of a second run."""
    spent = 0.0
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - start
    return spent


METHODS = ("nearest", "scales", "gptq", "qep")
ROWS = [
    *(("fp8-blockwise", method) for method in METHODS),
    *(("fp8-blockwise-ue8m0", method) for method in METHODS),
    *(("fp8-per-channel", method) for method in METHODS),
    *(("fp8-per-tensor", method) for method in METHODS),
    *(("mxfp8", method) for method in ("nearest", "gptq", "qep")),
]
BASES = {"fp8-blockwise-ue8m0": "fp8-blockwise"}
"""Ratios are to a recipe's rounding to nearest, or to another recipe's: what the powers of two are chosen instead of."""


def quantized(checkpoint: Path, out: Path, recipe: str, method: str, more: Sequence[str]) -> dict[str, Any]:
    """The report of a run."""
    shutil.rmtree(out, ignore_errors=True)
    # Blocks of any model fit in the Megatron form, whatever its sizes; its numbers are those of the other form.
    command = [sys.executable, "-m", "mptq", "quantize", checkpoint, "-o", out, "--overwrite", "-q", "--json"]
    command += ["--recipe", recipe, "--rounding", method, "--format", "megatron" if "block" in recipe else "hf", *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def ratio(found: dict[str, Any], base: dict[str, Any]) -> str:
    """The ratio of two means over the same sequences, with its jackknife error (sequences have the same length)."""
    pairs = list(zip(found["kl_of_sequences"], base["kl_of_sequences"], strict=True))
    over, under = map(sum, zip(*pairs, strict=True))
    left_out = [(over - one) / (under - other) for one, other in pairs]
    mean, count = sum(left_out) / len(pairs), len(pairs)
    spread = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in left_out))
    return f"{over / under:.3f} ± {spread:.3f}"


def table(checkpoint: Path, given: argparse.Namespace) -> None:
    """Print the rows of a checkpoint."""
    print(
        f"\n{checkpoint}\n\n| recipe | rounding | KL, in | ratio | KL, out | ratio | in, on Blackwell | ratio | seconds | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    first: dict[str, Any] = {}
    wanted = [row for row in ROWS if row[0] in (given.only or row[:1]) and row[1] in (given.method or row[1:])]
    needed = {(BASES.get(recipe, recipe), "nearest") for recipe, _ in wanted}
    for recipe, method in (row for row in ROWS if row in wanted or row in needed):
        report = quantized(checkpoint, given.work / "out", recipe, method, given.options)
        found = report["fidelity"]
        base = first.setdefault(BASES.get(recipe, recipe), found)
        cells = [recipe, method]
        for one, other in ((found, base), (found["unseen"], base["unseen"])):
            cells += [uncertain(one["kl"]["mean"], one["kl"]["standard_error"]), ratio(one, other)]
        # Powers of two are served as they are.
        served, other = ((one["served"] or one)["kl"]["mean"] for one in (found, base))
        cells += [f"{served:.4f}", f"{served / other:.3f}"]
        cells += [f"{report['seconds']['total']:.0f}", f"{report['peak_rss_bytes'] / 1e9:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    shutil.rmtree(given.work / "out", ignore_errors=True)


def main() -> None:
    """Print the tables, or a line for each step: seconds, FLOP/s of its products, and the ratio to the plain product's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    for name, value in (("rows", 4096), ("columns", 4096), ("tokens", 28672)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--work", type=Path, help="directory for outputs, which are removed again")
    parser.add_argument("--only", action="append", help="a recipe; repeatable. What its ratios are to is measured too")
    parser.add_argument("--method", action="append", choices=METHODS, help="a method; repeatable")
    parser.add_argument(
        "--options",
        type=str.split,
        default=["--eval-size", "16", "--unseen-size", "16"],
        help="more options of `mptq quantize`",
    )
    parser.add_argument("checkpoints", type=Path, nargs="*")
    given = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("mptq", "torch", "megatron-core", "nvidia-modelopt"))
    print(f"{platform.platform()}, {torch.get_num_threads()} threads; {packages}")
    for checkpoint in given.checkpoints:
        table(checkpoint, given)
    if not given.checkpoints:
        steps(given)


def steps(given: argparse.Namespace) -> None:
    """Print what the steps take for one matrix."""
    device, shape = given.device, (given.rows, given.columns)
    torch.manual_seed(0)
    inputs = torch.randn(given.tokens, given.columns, device=device).bfloat16()
    weight = torch.randn(shape, device=device) / 64
    batches = Batches(8, given.columns, {number: Inputs(part) for number, part in enumerate(inputs.chunk(8))})
    found = moments(batches, device, Ranks())
    moment, diagonal = damped(found.fitted, 0.1), found.fitted.diagonal().contiguous()
    made, _ = quantizer.quantize(weight, BLOCK, "w")
    assert made.amax is not None
    amax, scale = made.amax, element_scales(made, BLOCK)
    product = 2 * given.rows * given.columns**2
    steps: dict[str, tuple[Callable[[], object], float]] = {
        "plain product": (lambda: weight @ moment, product),
        "moment": (lambda: moments(batches, device, Ranks()), 2 * found.tokens * given.columns**2),
        "scales": (lambda: search([weight], diagonal, BLOCK, amax), 0),
        "GPTQ": (lambda: solve(weight, factored(moment, "w"), scale), 1.5 * product + given.columns**3 / 3),
    }
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{where}, torch {torch.__version__}; {given.rows} x {given.columns}, {given.tokens} tokens\n")
    plain = 0.0
    for name, (work, operations) in steps.items():
        spent = seconds(work, device)
        speed = operations / spent
        plain = plain or speed
        of = f", {speed / 1e9:.0f} GFLOP/s ({speed / plain:.2f} of the plain product's)" if operations else ""
        print(f"{name:14} {spent:.4f} s{of}")


if __name__ == "__main__":
    main()
