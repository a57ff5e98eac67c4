#!/usr/bin/env bash
# Several processes on one machine share the work; the output has the same bytes as with one. After an interruption, the
# same command continues:
#     PROCESSES=4 examples/torchrun.sh CKPT OUT fp8-blockwise [OPTIONS OF mptq quantize]
set -euo pipefail
checkpoint=${1:?checkpoint} out=${2:?output} recipe=${3:-fp8-blockwise}
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m mptq quantize "$checkpoint" -o "$out" --recipe "$recipe" --resume "${@:4}"
