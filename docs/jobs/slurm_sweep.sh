#!/bin/bash
# A sweep over the radius in eight shares, each on a GPU of its own: sbatch docs/jobs/slurm_sweep.sh
#
# The shares know nothing of each other: no process waits for another, and any order will do. A
# share that is started again leaves out what it has done; whoever is last writes sweep.json.
#SBATCH --job-name=rain_jax_sweep
#SBATCH --array=1-8
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.out
set -euo pipefail

python -m experiments.sweep \
    --config=experiments/configs/sweep_radius.py:8/255 \
    --workdir="${RUN:?the folder of a finished run, which all nodes see}" \
    --shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
