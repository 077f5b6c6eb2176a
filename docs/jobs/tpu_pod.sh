#!/bin/bash
# Trains on a TPU slice of 64 chips (16 hosts): bash docs/jobs/tpu_pod.sh NAME ZONE
#
# The same command on every host, one process each, which takes all four chips of its host;
# jax.distributed finds the others from the slice's own variables. The image's folder /mnt/shared
# stands for one that all hosts see, such as Filestore, with the data and the run in it.
set -euo pipefail
name=${1:?the name of the slice} zone=${2:?its zone}

gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
    --accelerator-type=v5p-128 --version=v2-alpha-tpuv5

everywhere() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

# Every host has its own copy of the checkout and, since the image's Python may be an older one than
# rain_jax takes, its own Python.
everywhere "cp -r /mnt/shared/rain_jax . && pip install uv && ~/.local/bin/uv venv -p 3.12 venv && \
    ~/.local/bin/uv pip install -p venv/bin/python './rain_jax[tpu]'"
everywhere "cd rain_jax && RAIN_JAX_DISTRIBUTED=1 ../venv/bin/python -m experiments.train \
    --config=experiments/configs/cifar10_resnet18.py \
    --config.network.dtype=bfloat16 \
    --config.training.batch_size=4096 \
    --config.data.data_dir=/mnt/shared/data \
    --workdir=/mnt/shared/runs/cifar10_resnet18"
