"""Measure time and memory of whole processes, interleaved, on a generated checkpoint of Llama-7B-sized layers.

    python scripts/bench_quantize.py --work DIR [--llmcompressor PYTHON] [--layers 8 16 | --inputs HF CKPT] [--runs 3]

Contenders: mptq; megatron-core + ModelOpt on the whole model; llm-compressor's model_free_ptq (run with a Python that
has it); `cp -r` of the input and `sync`. Every input is read once before the runs, so that it is in the page cache if
it fits. Peak RSS is that of the largest process (ru_maxrss of the waited-for child).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

SCRIPTS = Path(__file__).parent


def measure(command: list[str], log: Path) -> tuple[float, float]:
    """(seconds, peak RSS in GB) of a command; exits if it fails."""
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed: see {log}")
    return seconds, usage.ru_maxrss / 1e6


def make_inputs(work: Path, layers: int) -> tuple[Path, Path]:
    """The Hugging Face model and its Megatron checkpoint, created if missing."""
    hf, checkpoint = work / f"llama-{layers}", work / f"ckpt-{layers}"
    if not (hf / "config.json").is_file():
        command = [sys.executable, str(SCRIPTS / "random_llama.py"), "--layers", str(layers), "--out", str(hf)]
        subprocess.run(command, check=True)
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        command = [sys.executable, str(SCRIPTS / "make_checkpoint.py"), "--hf", str(hf), "--out", str(checkpoint)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return hf, checkpoint


def contenders(hf: Path, checkpoint: Path, out: Path, llmcompressor: str | None) -> dict[str, list[str]]:
    """The command of each contender, by name."""
    # Without fidelity metrics, which the other tools do not compute.
    quiet = ["--device", "cpu", "-q", "--eval-size", "0"]
    mptq = [sys.executable, "-m", "mptq", "quantize", str(checkpoint), *quiet, "-o", str(out), "--recipe"]
    commands = {
        "mptq fp8-blockwise, hf": [*mptq, "fp8-blockwise"],
        "mptq fp8-per-tensor, hf": [*mptq, "fp8-per-tensor"],
        "mptq fp8-per-channel, hf": [*mptq, "fp8-per-channel"],
        "mptq fp8-blockwise, hf + megatron": [*mptq, "fp8-blockwise", "--format", "hf,megatron"],
        "megatron-core + ModelOpt, whole model": [
            *(sys.executable, str(SCRIPTS / "peer_modelopt.py")),
            *(str(hf), str(checkpoint), str(out)),
        ],
        "cp -r of the input, sync": ["sh", "-c", f"cp -r {checkpoint} {out} && sync"],
    }
    if llmcompressor:
        commands["llm-compressor model_free_ptq FP8_BLOCK"] = [
            *(llmcompressor, str(SCRIPTS / "peer_llmcompressor.py")),
            *(str(hf), str(out)),
        ]
    return commands


@dataclass(frozen=True)
class Run:
    """Seconds and peak RSS (GB) of a process, and for mptq the seconds from the first byte read to the last byte on disk.

    `start` is the time outside of the stream: imports, planning, configs, the hash of the last file, the report.
    """

    seconds: float
    peak: float
    stream: float = math.nan

    @property
    def start(self) -> float:
        """Seconds outside of the stream."""
        return self.seconds - self.stream


def bench(hf: Path, checkpoint: Path, options: argparse.Namespace) -> dict[str, list[Run]]:
    """All runs of every contender, interleaved."""
    work = options.work
    out = work / "out"
    found: dict[str, list[Run]] = {}
    subprocess.run(f"cat {checkpoint}/*/* {hf}/* > /dev/null", shell=True, check=True)
    for _ in range(options.runs):
        for name, command in contenders(hf, checkpoint, out, options.llmcompressor).items():
            if options.only not in name:
                continue
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            seconds, peak = measure(command, work / "log.txt")
            report = out / "report.json"
            stream = json.loads(report.read_text())["seconds"]["stream"] if report.is_file() else math.nan
            found.setdefault(name, []).append(Run(seconds, peak, stream))
    shutil.rmtree(out, ignore_errors=True)
    return found


def row(runs: list[Run], first: float) -> str:
    """Medians, and the largest peak; `first` are the seconds of the contender that the others are compared with."""
    seconds, stream, start = (statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "stream", "start"))
    own = " | " if math.isnan(stream) else f"{stream:.1f} | {start:.1f}"
    return f"{seconds:.1f} | {seconds / first:.2f} | {own} | {max(run.peak for run in runs):.2f} |"


def main() -> None:
    """Run everything and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory with 30 GB of free space")
    parser.add_argument("--llmcompressor", help="Python interpreter that has llmcompressor")
    parser.add_argument("--layers", type=int, nargs="+", default=[8], help="layers of the generated checkpoints")
    parser.add_argument("--inputs", type=Path, nargs=2, metavar=("HF", "CKPT"), help="use an existing model, in both formats")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="run only the contenders whose names contain this")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    packages = ("mptq", "torch", "megatron-core", "nvidia-modelopt")
    print(f"{platform.platform()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in packages)}")
    if options.inputs:
        inputs = {options.inputs[1].name: options.inputs}
    else:
        inputs = {f"{layers} layers": make_inputs(options.work, layers) for layers in options.layers}
    for title, (hf, checkpoint) in inputs.items():
        found = bench(hf, checkpoint, options)
        first = statistics.median(run.seconds for run in next(iter(found.values())))
        print(f"\n| {title}, median of {options.runs} | seconds | relative to mptq | stream | the rest | peak RSS, GB |")
        print("|---|---|---|---|---|---|")
        for name, runs in found.items():
            print(f"| {name} | {row(runs, first)}", flush=True)


if __name__ == "__main__":
    main()
