"""RAIN on STL-10, the data of its authors, in front of a naturally trained classifier.

    python -m experiments.train --config=experiments/configs/stl10_natural.py
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr_small.py
    python -m experiments.train --config=experiments/configs/stl10_rain.py

Du et al. (arXiv:2004.14798), after the authors' code, with a small EDSR at a size for two CPU
cores. The authors' own: `--config.defence.upscaler.blocks=16 --config.defence.upscaler.width=64
--config.defence.shared_shift=true --config.start.drift=true --config.training.epochs=250
--config.training.batch_size=128 --config.schedule.name=piecewise
--config.schedule.at=(150,175,225) --config.schedule.factor=0.2 --config.schedule.peak=1e-4`,
with published weights in `--config.start.defence=FILE.npz`.

Seed 0, single passes over 40 test images: 63.0 % right, 0.0 in the worst case over the ladder
(README, "Defences").
"""

import ml_collections

from experiments.build import config
from experiments.recipes import EOT_PGD20, stl10_small


def get_config() -> ml_collections.ConfigDict:
    """SGD with the authors' momentum and weight decay, a larger rate for fewer epochs."""
    return config(
        seed=0,
        **stl10_small(crop_padding=4),
        defence=dict(name="rain", upscaler=dict(name="edsr", blocks=4, width=32)),
        start=dict(classifier="runs/stl10_natural", defence="runs/edsr_small", trained="defence"),
        method=dict(name="natural"),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="cosine", peak=1e-3),
        training=dict(epochs=5, batch_size=64),
        validation=dict(every_epochs=1, batch_size=100),
        checkpoints=dict(every_epochs=1),
        evaluation=dict(
            batch_size=50,
            images=100,
            eight_bit=True,
            attacks=dict(eot_pgd20=EOT_PGD20),
        ),
    )
