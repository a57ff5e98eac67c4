#!/usr/bin/env bash
# A Slurm job that distributes the layers over processes, on one node or several, and continues automatically after a time limit:
#     sbatch --nodes 2 --ntasks-per-node 4 examples/slurm.sh CKPT OUT fp8-blockwise [OPTIONS OF mptq quantize]
# Two minutes before the limit, or when preempted, every process finishes its current layer and exits with 75; the job is then requeued,
# and --resume continues the run.
#SBATCH --job-name=mptq
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -uo pipefail
checkpoint=${1:?checkpoint} out=${2:?output} recipe=${3:-fp8-blockwise}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# Not through torchrun, whose own exit code would replace 75. The variables are the ones that torchrun sets for its processes.
srun bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec mptq quantize "$0" -o "$1" --recipe "$2" --resume "${@:3}"' "$checkpoint" "$out" "$recipe" "${@:4}"
code=$?
if [ "$code" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
