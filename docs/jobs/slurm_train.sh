#!/bin/bash
# Trains on two nodes of eight GPUs: sbatch docs/jobs/slurm_train.sh
#
# One process for each GPU: jax.distributed finds the others from SLURM's variables and gives
# process i of a node its GPU i, so that all GPUs of the node must be visible to each. With one
# process for each node it would take the first GPU alone.
#
# The folder of the run is on a file system that all nodes see. Before the time is up everybody is
# told to stop, and saves; the job put into the queue again goes on where it was.
#SBATCH --job-name=rain_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

export RAIN_JAX_DISTRIBUTED=1

srun --gpu-bind=none python -m experiments.train \
    --config=experiments/configs/cifar10_resnet18.py \
    --config.network.dtype=bfloat16 \
    --config.training.batch_size=1024 \
    --config.data.data_dir="${DATA:?the folder that experiments.prepare wrote}" \
    --workdir="${RUN:?a folder that all nodes see}"
