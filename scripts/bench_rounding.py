"""Measure what rounding by the inputs takes for one matrix, beside a float32 product of the same size.

    python scripts/bench_rounding.py [--device cuda] [--rows 4096] [--columns 4096] [--tokens 28672]

The second moment of the inputs, the search for the scales of 128x128 blocks, and GPTQ; each after a first run.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch

from mptq.calibration.moments import moments
from mptq.distributed import Ranks
from mptq.quantize import quantizer
from mptq.quantize.rounding.gptq import damped, solve
from mptq.quantize.rounding.scales import search, spread
from mptq.recipes.schemes import SCHEMES

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


def main() -> None:
    """Print a line for each step: seconds, FLOP/s of its products, and the ratio to the plain product's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    for name, value in (("rows", 4096), ("columns", 4096), ("tokens", 28672)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    device, shape = given.device, (given.rows, given.columns)
    torch.manual_seed(0)
    inputs = torch.randn(given.tokens, given.columns, device=device).bfloat16()
    weight = torch.randn(shape, device=device) / 64
    found = moments({0: inputs}, 1, given.columns, device, Ranks())
    moment, diagonal = damped(found.fitted, 0.1), found.fitted.diagonal().contiguous()
    made, _ = quantizer.quantize(weight, BLOCK, "w")
    assert made.amax is not None
    amax, scale = made.amax, spread(made.scale, BLOCK, shape)
    product = 2 * given.rows * given.columns**2
    steps: dict[str, tuple[Callable[[], object], float]] = {
        "plain product": (lambda: weight @ moment, product),
        "moment": (lambda: moments({0: inputs}, 1, given.columns, device, Ranks()), 2 * given.tokens * given.columns**2),
        "scales": (lambda: search([weight], diagonal, BLOCK, amax), 0),
        "GPTQ": (lambda: solve(weight, moment, scale, "w"), 1.5 * product + given.columns**3 / 3),
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
