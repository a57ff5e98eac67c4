"""Write a random BF16 Llama (or, with experts, Mixtral) in the Hugging Face format, as input for benchmarks.

    python scripts/random_llama.py --layers 8 --out llama-7b-8

The defaults are Llama-7B's sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM


def main() -> None:
    """Build and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128, the head size")
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0, help="number of experts; 0: a dense model")
    options = parser.parse_args()
    fields = {
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 128,
        "num_key_value_heads": options.hidden // 128,
        "vocab_size": options.vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    if options.experts:
        made = MixtralForCausalLM(MixtralConfig(**fields, num_local_experts=options.experts, num_experts_per_tok=2))
    else:
        made = LlamaForCausalLM(LlamaConfig(**fields))
    made.save_pretrained(options.out)


if __name__ == "__main__":
    main()
