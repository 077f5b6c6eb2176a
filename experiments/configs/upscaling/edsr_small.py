"""A small EDSR (4 blocks of 32 channels) for RAIN, trained on photographs in minutes on CPU.

    python -m experiments.prepare --dataset=stl10_part --source=FOLDER --data_dir=DIR
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr_small.py

The authors' size is `--config.upscaler.blocks=16 --config.upscaler.width=64`, for an accelerator.
"""

import ml_collections

from experiments.upscale import config


def get_config() -> ml_collections.ConfigDict:
    """Pairs as RAIN makes them: one pixel of each 2x2 window at random, and the image."""
    return config(
        seed=0,
        data=dict(name="tfds:stl10_part", holdout=200),
        upscaler=dict(name="edsr", blocks=4, width=32),
        method=dict(down="random_pick", crop=48),
        optimiser=dict(name="adam"),
        schedule=dict(name="cosine", peak=5e-4),
        training=dict(epochs=20, batch_size=16),  # 3,500 steps
        validation=dict(every_epochs=5),
        checkpoints=dict(every_epochs=5),
    )
