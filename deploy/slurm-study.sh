#!/bin/bash
# A whole study on one GPU, from the folder of the checkout:
#   sbatch deploy/slurm-study.sh gemma-2-2b
# It makes what is missing. Stopped at its time limit or preempted, it saves its work and is queued again.
#SBATCH --job-name=dasae
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
. .venv/bin/activate
srun dasae ablate "$@"
status=$?
if [ "$status" -eq 143 ]; then  # stopped on request, with its work saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
