"""Measure time and peak memory of `mptq inspect` and `mptq --help`, as whole processes.

python scripts/make_metadata.py --out trillion
python scripts/bench_inspect.py trillion CKPT ...
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure each several times; print the median time and the largest memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--times", type=int, default=5, help="runs of each")
    options = parser.parse_args()

    mptq = [sys.executable, "-m", "mptq"]
    commands = {"--help": [*mptq, "--help"]} | {
        f"inspect {path}": [*mptq, "inspect", str(path)] for path in options.checkpoints
    }
    for name, command in commands.items():
        runs = sorted(measure(command) for _ in range(options.times))
        peak = max(memory for _, memory in runs)
        print(f"{name}: {runs[len(runs) // 2][0]:.2f} s (from {runs[0][0]:.2f} to {runs[-1][0]:.2f}), {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
