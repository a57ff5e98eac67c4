"""Measure the fidelity of Hugging Face outputs with transformers, on the same tokens as mptq's report, next to its metrics.

    python scripts/fidelity_transformers.py SOURCE OUT... [--dtype float32]

SOURCE is the Hugging Face directory of the unquantized model. The output's weights are dequantized (hf_output.py) into
transformers' model; calibrated inputs, K and V are rounded as in an engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import figures
import hf_output
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

E4M3_MAX = 448.0


def rounded(values: torch.Tensor, scale: float) -> torch.Tensor:
    """`values` rounded to E4M3 with a scale."""
    return ((values.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The model in `folder`, loaded by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def load_output(source: Path, out: Path, dtype: torch.dtype) -> Any:
    """The model of `source` with the weights of `out`; its linears round their inputs and its attention K and V."""
    model, tensors = load(source, dtype), hf_output.load_tensors(out)
    for name, module in model.named_modules():
        if f"{name}.weight" in tensors:
            module.weight.copy_(hf_output.weight(tensors, name))
        if f"{name}.input_scale" in tensors:
            scale = float(tensors[f"{name}.input_scale"])
            module.register_forward_pre_hook(lambda _module, inputs, scale=scale: (rounded(inputs[0], scale),))
    if hf_output.kv_scales(tensors, 0):

        def attention(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
        ) -> Any:
            found = hf_output.kv_scales(tensors, module.layer_idx)
            assert found is not None
            return sdpa_attention_forward(module, query, rounded(key, found[0]), rounded(value, found[1]), *args, **options)

        AttentionInterface.register("fp8-cache", attention)
        AttentionMaskInterface.register("fp8-cache", sdpa_mask)
        model.set_attn_implementation("fp8-cache")
    return model


def float32_head(model: Any) -> Any:
    """The model with float32 logits, as mptq computes them on a CPU, instead of rounding them to the model's dtype."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.float(), requires_grad=False)
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return model


@torch.no_grad()
def logits(model: Any, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [length, vocabulary] of each sequence."""
    return [model(ids[None]).logits[0] for ids in sequences]


def main() -> None:
    """Print a table with two rows per output: transformers' metrics and the report's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the computation")
    parser.add_argument("--float32-head", action="store_true", help="do not round logits to bfloat16")
    parser.add_argument("--calib-dataset", action="append", default=[], help="the same as in the runs")
    options = parser.parse_args()
    disable_progress_bar()
    figures.fast_bfloat16()
    dtype = getattr(torch, options.dtype)
    finished = float32_head if options.float32_head else lambda model: model
    made: dict[str, list[torch.Tensor]] = {}
    print(figures.HEADER)
    for out in options.out:
        report = figures.read_report(out)
        held_out, _ = figures.tokens(report, options.source, options.calib_dataset, calibrate=False)
        digest = report["calibration"]["held_out"]["sha256"]
        if digest not in made:
            made[digest] = logits(finished(load(options.source, dtype)), held_out)
        model = finished(load_output(options.source, out, dtype))
        found = figures.measure(held_out, made[digest], logits(model, held_out))
        print(figures.report_row(f"{out.name}, mptq", report))
        print(found.row(f"{out.name}, transformers in {options.dtype}", report), flush=True)


if __name__ == "__main__":
    main()
