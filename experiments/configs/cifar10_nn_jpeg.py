"""NN-favoured JPEG on CIFAR-10: four classifiers, each for its own level, that vote.

    python -m experiments.train --config=experiments/configs/cifar10_natural.py
    python -m experiments.analyse --workdir=runs/cifar10_natural
    python -m experiments.train --config=experiments/configs/cifar10_nn_jpeg.py

Zhang & Gao (arXiv:2106.13394), reconstructed from the abstract: tables, levels and schedule are our
own. The members learn side by side from one naturally trained classifier.
"""

import ml_collections

from experiments.build import config
from experiments.recipes import cifar10_small


def get_config() -> ml_collections.ConfigDict:
    """Tables from what the classifier feels of each frequency; SGD 1e-2, cosine, two epochs."""
    return config(
        seed=0,
        **cifar10_small(),
        defence=dict(name="nn_jpeg", table="nn", statistics="runs/cifar10_natural/statistics.npz"),
        ensemble=dict(key="defence.level", values=(15.0, 30.0, 45.0, 60.0)),
        start=dict(classifier="runs/cifar10_natural"),
        method=dict(name="natural"),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="cosine", peak=1e-2),
        training=dict(epochs=2, batch_size=128),
        validation=dict(every_epochs=1, batch_size=250),
        checkpoints=dict(every_epochs=0.5),
        evaluation=dict(
            batch_size=100,
            images=1000,
            eight_bit=True,
            attacks=dict(pgd20=dict(name="pgd", steps=20, step_size=2 / 255)),
        ),
    )
