"""Compare predicted and measured peak memory of runs over model sizes, formats and modes, each in a separate process.

    python scripts/bench_memory.py --work DIR [--only dense-768] [--keep]

The prediction comes from a dry run of the same command. The measurement is the peak resident set of the process
(ru_maxrss of the waited-for child, which starts at the RSS of this small process). Inputs are random models of at most
2 GB, which the script creates and removes again. Random weights need as much memory as trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from bench_quantize import SCRIPTS, measure

MODELS = {
    "dense-256": ["--hidden", "256", "--ffn", "768"],
    "dense-768": ["--hidden", "768", "--ffn", "2048", "--vocab", "49152"],
    "dense-2048": ["--hidden", "2048", "--ffn", "8192", "--vocab", "128256"],
    "dense-4096": [],
    "moe-1024": ["--hidden", "1024", "--ffn", "2048", "--experts", "16"],
}
"""Name -> options of random_llama.py."""
WEIGHTS = ["--eval-size", "0"]
BOTH = ["--format", "hf,megatron"]
MODES = {
    "weights, hf": WEIGHTS,
    "weights, hf + megatron": [*WEIGHTS, *BOTH],
    "activations of 1 x 512 tokens, hf": ["--eval-size", "1"],
    "activations of 8 x 512 tokens, hf": [],
    "activations of 8 x 512 tokens, hf + megatron": BOTH,
    "activations of 2 x 2048 tokens, hf": ["--calib-seq-length", "2048", "--eval-size", "2"],
    "static scales and cache of 8 x 512 tokens, hf + megatron": [
        *("--recipe", "fp8", "--calib-size", "8", "--eval-size", "1", "--kv-cache", "fp8", *BOTH),
    ],
}
"""Name -> options of `mptq quantize`, in addition to those of all runs."""
TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = ["<unk>", "</s>", *(chr(code) for code in range(33, 127)), *(f"w{number}" for number in range(20000))]
made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>").save_pretrained(sys.argv[1])
"""


def make(work: Path, name: str) -> Path:
    """Create the Megatron checkpoint of a model, and delete the Hugging Face form."""
    hf, checkpoint = work / f"hf-{name}", work / f"ckpt-{name}"
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        options = ["--layers", "2", *MODELS[name], "--out", str(hf)]
        subprocess.run([sys.executable, str(SCRIPTS / "random_llama.py"), *options], check=True, capture_output=True)
        command = [sys.executable, str(SCRIPTS / "make_checkpoint.py"), "--hf", str(hf), "--out", str(checkpoint)]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(hf)
    return checkpoint


def predicted(command: list[str]) -> float:
    """Predicted peak in GB, from a dry run."""
    done = subprocess.run([*command, "--dry-run", "--json"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)["predicted_peak_bytes"]) / 1e9


def main() -> None:
    """Run everything and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory with 6 GB of free space")
    parser.add_argument("--only", nargs="+", default=[""], help="run only models and modes whose names contain any of these")
    parser.add_argument("--inputs", type=Path, nargs=2, metavar=("TOKENIZER", "CKPT"), help="use an existing model")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "numba")
    print(f"{platform.platform()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in packages)}\n")
    print("| model | mode | predicted, GB | measured, GB | measured / predicted |")
    print("|---|---|---|---|---|")
    tokenizer = work / "tokenizer"
    subprocess.run([sys.executable, "-c", TOKENIZER, str(tokenizer)], check=True, capture_output=True)
    models = [options.inputs[1].name] if options.inputs else list(MODELS)
    ratios = []
    for model in models:
        chosen = [mode for mode in MODES if any(only in f"{model} {mode}" for only in options.only)]
        if not chosen:
            continue
        checkpoint = options.inputs[1] if options.inputs else make(work, model)
        for mode in chosen:
            out = work / "out"
            command = [sys.executable, "-m", "mptq", "quantize", str(checkpoint), "-o", str(out), "--device", "cpu", "-q"]
            command += ["--tokenizer", str(options.inputs[0] if options.inputs else tokenizer)]
            command += [*(() if "--recipe" in MODES[mode] else ("--recipe", "fp8-blockwise")), *MODES[mode]]
            shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
            expected = predicted(command)
            _, peak = measure(command, work / "log.txt")
            ratios.append(peak * 1.024 / expected)
            print(f"| {model} | {mode} | {expected:.2f} | {peak * 1.024:.2f} | {ratios[-1]:.2f} |", flush=True)
            shutil.rmtree(out)
        if not options.inputs and not options.keep:
            shutil.rmtree(checkpoint)
    print(f"\nmeasured / predicted: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
