"""Greedy continuations from a Hugging Face directory with vLLM on the CPU (run by check_vllm.sh)."""

import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):"]


def main() -> None:
    """Load with the output's own quantization config and print what it says."""
    from vllm import LLM, SamplingParams

    model = LLM(sys.argv[1], max_model_len=512, enforce_eager=True, dtype="bfloat16")
    for request in model.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False):
        print(f"{request.prompt!r} -> {request.outputs[0].text!r}")


if __name__ == "__main__":
    main()
