"""Continue the same prompts greedily with several models, side by side, and show what mptq's reports say of each.

FP8 blocks are dequantized, so that it runs on any machine.

python scripts/compare.py BF16_DIR FP8_DIR...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
from transformers.utils.logging import disable_progress_bar

PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):")


def continuations(folder: Path, tokens: int) -> list[str]:
    """The greedy continuation of every prompt."""
    config = json.loads((folder / "config.json").read_text())
    options = {}
    if config.get("quantization_config", {}).get("quant_method") == "fp8":
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found.append(tokenizer.decode(out[0, inputs.input_ids.shape[1] :]))
    return found


def fidelity(folder: Path) -> list[str]:
    """What an output's report says: KL in nats per token and top-1 agreement on held-out text, and KL on an unseen kind."""
    report = folder / "report.json"
    found = json.loads(report.read_text())["fidelity"] if report.is_file() else None
    if found is None:
        return ["-"] * 3
    unseen = found["unseen"] and f"{found['unseen']['kl']['mean']:.4f}"
    return [f"{found['kl']['mean']:.4f}", f"{100 * found['top1_agreement']['mean']:.2f} %", unseen or "-"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="Hugging Face directories")
    parser.add_argument("--tokens", type=int, default=12, help="tokens to generate")
    options = parser.parse_args()
    disable_progress_bar()
    table = Table("", *(Column(folder.name, overflow="fold") for folder in options.models))
    columns = [continuations(folder, options.tokens) for folder in options.models]
    for row in zip(PROMPTS, *columns, strict=True):
        table.add_row(*(repr(cell)[1:-1] for cell in row))
    table.add_section()
    figures = ("KL, held-out text", "top-1 agreement", "KL, unseen kind")
    for name, *row in zip(figures, *map(fidelity, options.models), strict=True):
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
