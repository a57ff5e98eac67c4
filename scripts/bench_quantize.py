"""Time and memory of whole processes, in turn, on a checkpoint of Llama-7B-sized layers that it makes.

    python scripts/bench_quantize.py --work DIR [--llmcompressor PYTHON] [--layers 8 16 | --inputs HF CKPT] [--runs 3]

Contenders: mptq; megatron-core + ModelOpt on the whole model; llm-compressor's model_free_ptq (from a Python that has it);
`cp -r` of the input and `sync`. Every input is read once before the runs, so all find it in the page cache as far as it
fits. Peak RSS is that of the largest process (ru_maxrss of the waited-for child).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

SCRIPTS = Path(__file__).parent


def measure(command: list[str], log: Path) -> tuple[float, float]:
    """(seconds, peak RSS in GB) of a command run to its end; stops everything when it fails."""
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed: see {log}")
    return seconds, usage.ru_maxrss / 1e6


def make_inputs(work: Path, layers: int) -> tuple[Path, Path]:
    """The Hugging Face model and its Megatron checkpoint, made once."""
    hf, checkpoint = work / f"llama-{layers}", work / f"ckpt-{layers}"
    if not (hf / "config.json").is_file():
        command = [sys.executable, str(SCRIPTS / "random_llama.py"), "--layers", str(layers), "--out", str(hf)]
        subprocess.run(command, check=True)
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        command = [sys.executable, str(SCRIPTS / "make_checkpoint.py"), "--hf", str(hf), "--out", str(checkpoint)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return hf, checkpoint


def contenders(hf: Path, checkpoint: Path, out: Path, llmcompressor: str | None) -> dict[str, list[str]]:
    """Name and command of each."""
    # Without fidelity figures, which the others do not make.
    quiet = ["--device", "cpu", "-q", "--eval-size", "0"]
    mptq = [sys.executable, "-m", "mptq", "quantize", str(checkpoint), *quiet, "-o", str(out), "--recipe"]
    commands = {
        "mptq fp8-blockwise, hf": [*mptq, "fp8-blockwise"],
        "mptq fp8-per-tensor, hf": [*mptq, "fp8-per-tensor"],
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


def bench(hf: Path, checkpoint: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds and largest peak RSS of every contender, run in turn."""
    work = options.work
    out = work / "out"
    found: dict[str, list[tuple[float, float]]] = {}
    subprocess.run(f"cat {checkpoint}/*/* {hf}/* > /dev/null", shell=True, check=True)
    for _ in range(options.runs):
        for name, command in contenders(hf, checkpoint, out, options.llmcompressor).items():
            if options.only not in name:
                continue
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            found.setdefault(name, []).append(measure(command, work / "log.txt"))
    shutil.rmtree(out, ignore_errors=True)
    return {
        name: (statistics.median(seconds for seconds, _ in rows), max(peak for _, peak in rows)) for name, rows in found.items()
    }


def main() -> None:
    """Run everything and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory with 30 GB of room")
    parser.add_argument("--llmcompressor", help="Python interpreter that has llmcompressor")
    parser.add_argument("--layers", type=int, nargs="+", default=[8], help="layers of the checkpoints that are made")
    parser.add_argument("--inputs", type=Path, nargs=2, metavar=("HF", "CKPT"), help="a model that is there, in both forms")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="run the contenders that have this in their name")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    packages = ("mptq", "torch", "megatron-core", "nvidia-modelopt")
    print(f"{platform.platform()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in packages)}")
    if options.inputs:
        inputs = {options.inputs[1].name: options.inputs}
    else:
        inputs = {f"{layers} layers": make_inputs(options.work, layers) for layers in options.layers}
    for title, (hf, checkpoint) in inputs.items():
        rows = bench(hf, checkpoint, options)
        first = next(iter(rows.values()))[0]
        print(f"\n| {title}, median of {options.runs} | seconds | to mptq | peak RSS, GB |\n|---|---|---|---|")
        for name, (seconds, peak) in rows.items():
            print(f"| {name} | {seconds:.1f} | {seconds / first:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
