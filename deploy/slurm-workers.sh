#!/bin/bash
# Dask workers, one for each GPU, for flows or studies with [run] engine = "dask". From the folder of the checkout, with the
# address of a `dask scheduler` on the login node:
#   sbatch --ntasks=8 deploy/slurm-workers.sh tcp://login:8786
# Workers may come and go: another one takes over the tasks of a lost one.
#SBATCH --job-name=dasae-workers
#SBATCH --ntasks=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-gpu=64G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
address=${1:?the address of the scheduler, such as tcp://login:8786}
. .venv/bin/activate
exec srun --kill-on-bad-exit=0 dask worker "$address" --nthreads 1 --memory-limit 0 --local-directory "${TMPDIR:-/tmp}"
