#!/usr/bin/env bash
# The main use case on a real model: save SmolLM2-135M as a Megatron checkpoint, quantize it to blockwise FP8, load it back.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
source .venv/bin/activate
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
quietly() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@" >demo/log.txt 2>&1 || { cat demo/log.txt >&2; exit 1; }
}

rm -rf demo
mkdir demo
quietly python scripts/smollm2.py --out demo/smollm2 --hidden 768
quietly python scripts/make_checkpoint.py --hf demo/smollm2 --out demo/ckpt
step mptq inspect demo/ckpt
step mptq quantize --recipe fp8-blockwise demo/ckpt
step mptq inspect demo/ckpt-fp8-blockwise
step mptq verify demo/ckpt-fp8-blockwise --against demo/ckpt
step mptq report demo/ckpt-fp8-blockwise
step python scripts/compare.py demo/smollm2 demo/ckpt-fp8-blockwise
