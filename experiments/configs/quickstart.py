"""A small CNN on scikit-learn's digits, adversarially trained, beside a naturally trained twin.

python -m experiments.train --config=experiments/configs/quickstart.py
"""

import ml_collections

from rain_jax.config import config


def get_config() -> ml_collections.ConfigDict:
    """L-inf radius 0.15 on 8x8 digits: visible, and the digits can still be read."""
    return config(
        seed=0,
        data=dict(name="digits", holdout=200),
        network=dict(name="cnn"),
        threat=dict(norm="linf", radius=0.15),
        method=dict(name="adversarial", attack=dict(name="pgd", steps=10, keep="last")),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.1),
        average=dict(decay=0.995),
        training=dict(epochs=60, batch_size=64),
        validation=dict(every_epochs=5, attack=dict(name="pgd", steps=10)),
        checkpoints=dict(every_epochs=5),
        evaluation=dict(attacks=dict(pgd40=dict(name="pgd", steps=40, restarts=5))),
        # Chosen by robust accuracy, the twin would be one that was hardly trained: its last it is.
        twin=dict(method=dict(name="natural"), validation=None),
    )
