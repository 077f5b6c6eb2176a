"""A small EDSR (4 blocks of 32 channels) for the images that RAIN is tried on.

python -m experiments.upscale --config=experiments/configs/upscaling/edsr_small.py
"""

import ml_collections

from experiments.upscale import config


def get_config() -> ml_collections.ConfigDict:
    """Pairs as RAIN makes them: one pixel of each 2x2 window at random, and the image."""
    return config(
        seed=0,
        data=dict(name="tfds:stl10", holdout=200),
        upscaler=dict(name="edsr", blocks=4, width=32),
        method=dict(down="random_pick", crop=48),
        optimiser=dict(name="adam"),
        schedule=dict(name="constant", peak=1e-4),
        training=dict(epochs=65, batch_size=16),  # about 20,000 steps
        validation=dict(every_epochs=5),
        checkpoints=dict(every_epochs=5),
    )
