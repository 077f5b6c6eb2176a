"""PGD adversarial training of a small PreAct ResNet on CIFAR-10, at a size for two CPU cores.

python -m experiments.train --config=experiments/configs/cifar10_small.py
"""

import ml_collections

from experiments.recipes import PGD20, cifar10_small
from rain_jax.config import config


def get_config() -> ml_collections.ConfigDict:
    """A ResNet-8 of width 16, three attack steps, seven epochs; evaluated on all test images."""
    return config(
        seed=0,
        **cifar10_small(),
        method=dict(
            name="adversarial",
            attack=dict(name="pgd", steps=3, step_size=4 / 255, keep="last"),
        ),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.2),
        average=dict(decay=0.995),
        training=dict(epochs=7, batch_size=128),
        validation=dict(
            every_epochs=1, attack=dict(name="pgd", steps=10, step_size=2 / 255), batch_size=250
        ),
        checkpoints=dict(every_epochs=0.5),
        evaluation=dict(batch_size=250, attacks=dict(pgd20=PGD20)),
    )
