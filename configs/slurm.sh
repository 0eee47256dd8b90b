#!/bin/bash
# Trains one stage on several machines of a SLURM cluster, in a folder that all of them see:
#
#     sbatch --nodes 2 --gpus-per-node 4 configs/slurm.sh pretrain
#
# torchrun starts the processes of a machine again when one of them dies; SLURM starts the job again
# when a machine does, or when it needs the machine for another job. Either goes on from the last
# checkpoint.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
source .venv/bin/activate
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# This script runs on the first machine of the job.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d \
    --rdzv-endpoint "$(hostname):29500" --max-restarts 3 -m "train.$1"
