"""Natural training of a small PreAct ResNet on STL-10's images of 96x96.

    python -m experiments.prepare --dataset=stl10_part --source=FOLDER --data_dir=DIR
    python -m experiments.train --config=experiments/configs/stl10_natural.py

On `stl10_part`: 3,000 training images and 1,000 test images, both from STL-10's labelled training
part, so that its figures compare with no published one. `--config.data.name=tfds:stl10` is the
whole.
"""

import ml_collections

from experiments.build import config


def get_config() -> ml_collections.ConfigDict:
    """A ResNet-10 of width 16, 60 epochs, smoothed labels."""
    return config(
        seed=0,
        data=dict(name="tfds:stl10_part", holdout=300),
        augment=dict(crop_padding=12, flip=True),
        network=dict(
            name="preact_resnet",
            depths=(1, 1, 1, 1),
            width=16,
            mean=(0.4467, 0.4398, 0.4066),
            std=(0.2603, 0.2566, 0.2713),
        ),
        threat=dict(norm="linf", radius=8 / 255),
        method=dict(name="natural", label_smoothing=0.1),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.1),
        average=dict(decay=0.995),
        training=dict(epochs=60, batch_size=64),
        validation=dict(every_epochs=5, batch_size=100),
        checkpoints=dict(every_epochs=5),
        evaluation=dict(
            batch_size=100, attacks=dict(pgd20=dict(name="pgd", steps=20, step_size=2 / 255))
        ),
    )
