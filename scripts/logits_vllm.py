"""Compare the probabilities of vLLM (CPU build, float32) with megatron-core's, for models of tests/support/zoo.py.

    python -m tests.support.build_zoo qwen3 mixtral --out ZOO
    mptq quantize --recipe none ZOO/qwen3/ckpt -o OUT/qwen3
    python scripts/logits_vllm.py OUT/qwen3 ZOO/qwen3/logits.pt        # in the environment created by check_vllm.sh

Prints the mean KL divergence (nats) and the largest difference of a log-probability; exits with 1 above 1e-6 nats.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
NOISE = 1e-6
"""Nats: a rotary embedding permuted in one head gives 1e-3 and more."""


def predicted(folder: Path, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Log-probabilities by vLLM [sequences, length - 1, vocabulary] of every token except the first."""
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder),
        max_model_len=ids.shape[1] + 8,
        enforce_eager=True,
        dtype="float32",
        skip_tokenizer_init=True,
        max_logprobs=-1,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    found = torch.full((*ids.shape, vocabulary), -torch.inf)[:, 1:]
    requests = model.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
    for row, request in enumerate(requests):
        for place, chances in enumerate(request.prompt_logprobs[1:]):
            for token, chance in chances.items():
                if token < vocabulary:
                    found[row, place, token] = chance.logprob
    return found.log_softmax(-1)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("logits", type=Path)
    options = parser.parse_args()
    os.environ |= SETTINGS
    saved = torch.load(options.logits)
    expected = saved["logits"].float()[:, :-1].log_softmax(-1)
    found = predicted(options.out, saved["ids"], expected.shape[-1])
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    print(f"{options.out.name}: KL {divergence:.1e} nats, largest difference {float((expected - found).abs().max()):.1e}")
    if not abs(divergence) < NOISE:
        sys.exit(1)


if __name__ == "__main__":
    main()
