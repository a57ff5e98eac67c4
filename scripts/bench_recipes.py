"""Measure the cost of each recipe on a model: bytes, fidelity on the default data, time and peak memory, as a Markdown table.

    python scripts/bench_recipes.py --work DIR CKPT...      # each recipe uses the first checkpoint that it fits

Every row is a separate process.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mptq.recipes.recipe import recipe_names
from mptq.report.formatting import size, uncertain

VARIANTS = [[name, *cache] for name in recipe_names() for cache in ([], ["--kv-cache", "fp8"])]


def quantize(checkpoint: Path, out: Path, recipe: list[str]) -> tuple[dict[str, Any] | None, float]:
    """The report of a run and its seconds; (None, seconds) if the recipe does not fit the model."""
    command = [sys.executable, "-m", "mptq", "quantize", checkpoint, "-o", out, "-q", "--json", "--device", "cpu", "--recipe"]
    started = time.perf_counter()
    done = subprocess.run([*map(str, command), *recipe], capture_output=True, text=True, check=False)
    spent = time.perf_counter() - started
    if done.returncode and "multiples of" not in done.stderr:
        raise SystemExit(done.stderr)
    return (json.loads(done.stdout) if done.stdout else None), spent


def row(name: str, checkpoint: Path, report: dict[str, Any], seconds: float) -> str:
    """A row of the table."""
    found = report["fidelity"]
    perplexity, agreement = found["perplexity"], found["top1_agreement"]
    cells = [
        name,
        checkpoint.name,
        f"{size(report['bytes']['in'])} -> {size(report['bytes']['hf'])}",
        uncertain(found["kl"]["mean"], found["kl"]["standard_error"]),
        uncertain(perplexity["ratio"], perplexity["ratio_standard_error"]),
        uncertain(100 * agreement["mean"], 100 * agreement["standard_error"]),
        f"{seconds:.0f}",
        f"{report['peak_rss_bytes'] / 1e9:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run every recipe and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for outputs, which are removed again")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    options = parser.parse_args()
    packages = ("mptq", "torch", "megatron-core", "nvidia-modelopt")
    print(f"{platform.platform()}; {', '.join(f'{name} {version(name)}' for name in packages)}\n")
    print("| recipe | checkpoint | bytes | KL, nats | perplexity ratio | top-1, % | seconds | peak RSS, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in VARIANTS:
        for checkpoint in options.checkpoints:
            shutil.rmtree(options.work / "out", ignore_errors=True)
            report, seconds = quantize(checkpoint, options.work / "out", recipe)
            if report is not None:
                print(row(" ".join(recipe), checkpoint, report, seconds), flush=True)
                break
    shutil.rmtree(options.work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
