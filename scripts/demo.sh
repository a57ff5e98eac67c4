#!/usr/bin/env bash
# The main use case on a real model: save SmolLM2-135M as a Megatron checkpoint, quantize it with codes fitted to
# calibration data and with codes rounded to nearest, and compare both with the original.
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

# Few tokens, so that it takes minutes on two cores: the default is 64 sequences of 512.
few=(--calib-size 8 --calib-seq-length 256 --eval-size 3 --unseen-size 2)
best=demo/ckpt-fp8-per-channel-gptq
nearest=demo/ckpt-fp8-per-channel

rm -rf demo
mkdir demo
quietly python scripts/smollm2.py --out demo/smollm2 --hidden 576
quietly python scripts/make_checkpoint.py --hf demo/smollm2 --out demo/ckpt
step mptq inspect demo/ckpt
step mptq quantize --recipe fp8-per-channel-gptq "${few[@]}" demo/ckpt
step mptq verify $best --against demo/ckpt
step mptq quantize --quiet --recipe fp8-per-channel "${few[@]}" demo/ckpt
step mptq report $nearest
step python scripts/compare.py demo/smollm2 $nearest $best
printf '\nThe whole report, with plots: open %s in a browser\n' "$PWD/$best/report.html"
