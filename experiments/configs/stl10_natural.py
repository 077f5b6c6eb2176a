"""Natural training of a small PreAct ResNet on STL-10's images of 96x96.

    python -m experiments.prepare --dataset=stl10_part --source=FOLDER --data_dir=DIR
    python -m experiments.train --config=experiments/configs/stl10_natural.py

On `stl10_part`: 3,000 training images and 1,000 test images, both from STL-10's labelled training
part, so that its figures compare with no published one. `--config.data.name=tfds:stl10` is the
whole. Seed 0: 67.6 [64.6, 70.4] % of those 1,000 test images, none under PGD-20. With `:full` it is
a PreAct ResNet-18, for a GPU: 79.3 [76.7, 81.7], and none (docs/gpu.md).
"""

import ml_collections

from experiments.recipes import PGD20, stl10
from rain_jax.checks import one_of
from rain_jax.config import config


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """A ResNet-10 of width 16 for 30 epochs or, "full", a ResNet-18 for 100; smoothed labels."""
    full = one_of("size", size, ("small", "full")) == "full"
    return config(
        seed=0,
        **stl10(crop_padding=12, full=full),
        method=dict(name="natural", label_smoothing=0.1),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.1),
        average=dict(decay=0.995),
        training=dict(epochs=100 if full else 30, batch_size=64 if full else 32),
        validation=dict(every_epochs=5, batch_size=100),
        checkpoints=dict(every_epochs=5),
        evaluation=dict(batch_size=100, attacks=dict(pgd20=PGD20)),
    )
