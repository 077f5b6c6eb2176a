"""Rice et al., Overfitting in adversarially robust deep learning (arXiv:2002.11569).

    python -m experiments.train --config=experiments/configs/published/rice2020.py \
        --workdir=runs/rice2020
    python -m experiments.train --config=experiments/configs/published/rice2020.py:wrn_34_10 \
        --workdir=runs/rice2020_wrn

Settings reproduced from locuslab/robust_overfitting: PGD-10 with steps of 2/255 from a uniform
start, batch normalisation in training mode inside it, SGD 0.1 with a tenth after half and three
quarters of 200 epochs, decay 5e-4 on all weights, batch 128, and the best checkpoint by PGD-10 on
1,000 held-out images. Their log has 82.9 % clean and 53.5 % under PGD-10 for the ResNet-18. Not run
by us so far: it needs an accelerator.
"""

import ml_collections

from experiments.recipes import CIFAR10, EIGHT
from rain_jax.checks import one_of
from rain_jax.config import config

TEXTS = ("preact_resnet18", "wrn_34_10")


def get_config(network: str = "preact_resnet18") -> ml_collections.ConfigDict:
    """The recipe for one of the two networks."""
    pgd = dict(name="pgd", steps=10, step_size=2 / 255)
    return config(
        seed=0,
        data=dict(name="tfds:cifar10", holdout=1000),
        augment=dict(crop_padding=4, flip=True),
        network=dict(name=one_of("network", network, TEXTS), **CIFAR10),
        threat=EIGHT,
        method=dict(name="adversarial", batch_norm="train", attack=dict(pgd, keep="last")),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="piecewise", peak=0.1, at=(100, 150)),
        training=dict(epochs=200, batch_size=128),
        validation=dict(every_epochs=1, attack=pgd),
        checkpoints=dict(every_epochs=1),
        evaluation=dict(batch_size=500, suite="standard"),
    )
