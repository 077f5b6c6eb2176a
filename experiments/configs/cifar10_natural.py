"""Natural training of a small PreAct ResNet on CIFAR-10: what defences are put in front of.

python -m experiments.train --config=experiments/configs/cifar10_natural.py
"""

import ml_collections

from experiments.recipes import PGD20, cifar10_small
from rain_jax.config import config


def get_config() -> ml_collections.ConfigDict:
    """The network of `cifar10_small.py`, seven epochs; the best by held-out clean accuracy."""
    return config(
        seed=0,
        **cifar10_small(),
        method=dict(name="natural"),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.2),
        average=dict(decay=0.995),
        training=dict(epochs=7, batch_size=128),
        validation=dict(every_epochs=1, batch_size=250),
        checkpoints=dict(every_epochs=1),
        evaluation=dict(batch_size=250, attacks=dict(pgd20=PGD20)),
    )
