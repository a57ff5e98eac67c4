"""Run llm-compressor's `model_free_ptq` on the same weights as safetensors (with a Python that has llmcompressor).

python scripts/peer_llmcompressor.py HF_DIR OUT
"""

import sys

from llmcompressor import model_free_ptq

if __name__ == "__main__":
    model_free_ptq(
        model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="FP8_BLOCK", ignore=["lm_head"], max_workers=2, device="cpu"
    )
