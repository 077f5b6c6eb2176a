"""PGD adversarial training of a small CNN on MNIST at L-inf 0.3, for two CPU cores.

    python -m experiments.train --config=experiments/configs/mnist.py

At this radius plain networks sit on the plateau of constant logits for long. Batch normalisation,
normalised pixels and a learning rate that starts high leave it within the first half epoch.
"""

import ml_collections

from rain_jax.config import config


def get_config() -> ml_collections.ConfigDict:
    """Two 4x4 convolutions and a dense layer; PGD-10 in training, PGD-100 with 5 restarts after."""
    return config(
        seed=0,
        data=dict(name="tfds:mnist", holdout=1000),
        network=dict(
            name="cnn", widths=(32, 64), hidden=256, batch_norm=True, mean=0.1307, std=0.3081
        ),
        threat=dict(norm="linf", radius=0.3),
        method=dict(
            name="adversarial",
            attack=dict(name="pgd", steps=10, step_size=0.075, keep="last"),
        ),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="cosine", peak=0.05),
        average=dict(decay=0.995),
        training=dict(epochs=20, batch_size=100),
        validation=dict(
            every_epochs=1, attack=dict(name="pgd", steps=40, step_size=0.02), batch_size=250
        ),
        checkpoints=dict(every_epochs=1),
        evaluation=dict(
            batch_size=500,
            attacks=dict(pgd100=dict(name="pgd", steps=100, step_size=0.01, restarts=5)),
        ),
    )
