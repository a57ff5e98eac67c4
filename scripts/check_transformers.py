"""Generate greedily from Hugging Face outputs with transformers, and check the weights that it loaded.

    python scripts/check_transformers.py OUT...

Columns of every linear's weight are computed and compared with the file's (hf_output.py), and the logits with those of the same
model with dequantized weights. Exits with 1 if transformers computes with other values than the file's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hf_output
import torch
from compressed_tensors.quantization import disable_quantization
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
from transformers.utils.logging import disable_progress_bar


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it in BF16, blocks dequantized (their kernel needs a GPU), and its loading info."""
    blocks = hf_output.load_config(folder).get("quant_method") == "fp8"
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if blocks else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    return model.eval(), info


@torch.no_grad()
def dequantized(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """The model in BF16 with weights dequantized by this script."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if f"{name}.weight" in tensors:
            module.weight.copy_(hf_output.weight(tensors, name))
    return model.eval()


def linears(model: Any) -> dict[str, torch.nn.Module]:
    """The linears of the layers."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


@torch.no_grad()
def distance(left: Any, right: Any, ids: torch.Tensor) -> float:
    """Distance of the logits of two models, relative to the second's (Frobenius norms)."""
    first, second = left(ids).logits.float(), right(ids).logits.float()
    return float((first - second).norm() / second.norm())


@torch.no_grad()
def check(folder: Path) -> bool:
    """Print the checks of one output; return whether transformers computes with the file's values."""
    tensors = hf_output.load_tensors(folder)
    model, info = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model(torch.zeros(1, 2, dtype=torch.int64))  # compressed-tensors dequantizes on the first call
    kinds = Counter(f"{type(module).__name__} {module.weight.dtype}" for module in linears(model).values())
    errors = {name: hf_output.column_error(module, [name], tensors) for name, module in linears(model).items()}
    name = max(errors, key=lambda key: errors[key])
    print(f"{folder.name}: {hf_output.load_config(folder).get('quant_method', 'not quantized')}; {dict(kinds)}")
    print(f"  missing {sorted(info['missing_keys'])[:3]}, unexpected {len(info['unexpected_keys'])}")
    print(f"  weights against the file's: {errors[name]:.1e} at most ({name})")
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in hf_output.PROMPTS]
    plain = dequantized(folder, tensors)
    for prompt in ids:
        text = tokenizer.decode(model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :])
        print(f"  {tokenizer.decode(prompt[0])!r} -> {text!r}")
    print("  logits against the dequantized model's: " + ", ".join(f"{distance(model, plain, prompt):.1e}" for prompt in ids))
    model.apply(disable_quantization)  # stops compressed-tensors from rounding the inputs of linears
    print("  inputs not rounded: " + ", ".join(f"{distance(model, plain, prompt):.1e}" for prompt in ids), flush=True)
    return errors[name] < hf_output.NOISE


def main() -> None:
    """Check every output given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+")
    disable_progress_bar()
    wrong = [str(out) for out in parser.parse_args().out if not check(out)]
    if wrong:
        sys.exit(f"{', '.join(wrong)}: transformers does not compute with the weights and scales of the file")


if __name__ == "__main__":
    main()
