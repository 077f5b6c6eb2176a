"""A small EDSR (4 blocks of 32 channels) on images halved by bicubic interpolation.

    python -m experiments.prepare --dataset=stl10_part --source=FOLDER --data_dir=DIR
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr_bicubic.py

The task that super-resolution networks are compared by, on the photographs of `edsr_small.py`:
whether the network and its trainer are what they should be. RAIN's halves its images otherwise.
"""

import ml_collections

from experiments.upscale import config


def get_config() -> ml_collections.ConfigDict:
    """Adam 1e-3, cosine, 45 epochs or 7,875 steps; weights averaged."""
    return config(
        seed=0,
        data=dict(name="tfds:stl10_part", holdout=200),
        upscaler=dict(name="edsr", blocks=4, width=32),
        method=dict(down="bicubic", crop=48),
        optimiser=dict(name="adam"),
        schedule=dict(name="cosine", peak=1e-3),
        average=dict(decay=0.999),
        training=dict(epochs=45, batch_size=16),
        validation=dict(every_epochs=5),
        checkpoints=dict(every_epochs=5),
    )
