"""EDSR at its authors' size (16 blocks of 64 channels, 1,369,859 weights), for one GPU.

    python -m experiments.prepare --dataset=stl10_part --source=FOLDER --data_dir=DIR
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr.py --workdir=runs/edsr
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr.py:bicubic \
        --workdir=runs/edsr_for_bicubic

"random_pick", the default, halves as RAIN does; "bicubic" is the task that super-resolution
networks are compared by. The photographs are those of `edsr_small.py`, a small part of what the
authors trained on, so that lengths and rates are ours.

Seed 0, one H200, on the 1,000 test photographs: "bicubic" 29.76 dB, where bicubic interpolation
gives 26.20; "random_pick" 26.52 after 80 epochs, 23.55 (docs/gpu.md).
"""

import ml_collections

from experiments.upscale import config


def get_config(down: str = "random_pick") -> ml_collections.ConfigDict:
    """Mirrored and turned squares of 64 pixels, bfloat16; Adam, cosine, 400 epochs; averaged."""
    return config(
        seed=0,
        data=dict(name="tfds:stl10_part", holdout=200),
        upscaler=dict(name="edsr", dtype="bfloat16"),
        method=dict(down=down, crop=64, turn=True),
        optimiser=dict(name="adam"),
        schedule=dict(name="cosine", peak=3e-4, warmup=2),
        average=dict(decay=0.999),
        training=dict(epochs=400, batch_size=32),  # 34,800 steps
        validation=dict(every_epochs=20),
        checkpoints=dict(every_epochs=20),
    )
