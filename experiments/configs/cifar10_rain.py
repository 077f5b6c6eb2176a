"""RAIN on CIFAR-10 in front of a naturally trained classifier, at a size for two CPU cores.

    python -m experiments.train --config=experiments/configs/cifar10_natural.py
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr_small.py
    python -m experiments.train --config=experiments/configs/cifar10_rain.py

Du et al. (arXiv:2004.14798), after the authors' code: the classifier stays as it is, and the
super-resolution network learns to serve it, by cross-entropy on clean images. Theirs is EDSR with
16 blocks of 64 channels on STL-10 and ImageNet, 250 epochs; ours a small one, and two epochs.
"""

import ml_collections

from experiments.recipes import EOT_PGD20, cifar10_small
from rain_jax.config import config


def get_config() -> ml_collections.ConfigDict:
    """SGD with the authors' momentum and weight decay, and ten times their rate."""
    return config(
        seed=0,
        **cifar10_small(),
        defence=dict(name="rain", upscaler=dict(name="edsr", blocks=4, width=32)),
        start=dict(classifier="runs/cifar10_natural", defence="runs/edsr_small", trained="defence"),
        method=dict(name="natural"),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="cosine", peak=1e-3),
        training=dict(epochs=2, batch_size=128),
        validation=dict(every_epochs=1, batch_size=250),
        checkpoints=dict(every_epochs=0.5),
        evaluation=dict(
            batch_size=100,
            images=200,
            eight_bit=True,
            attacks=dict(
                eot_pgd20=EOT_PGD20,
                eot_pgd20_means={**EOT_PGD20, "through": "average_one_shift"},
            ),
        ),
    )
