"""RAT on CIFAR-10 at L-inf 8/255, from the natural row of `configs/methods/cifar10.py`.

    python -m experiments.train --config=experiments/configs/methods/cifar10.py:natural \
        --workdir=runs/methods/cifar10/natural_0
    python -m experiments.rat --config=experiments/configs/rat/cifar10.py --workdir=runs/rat_cifar10

Two rounds of two epochs and perturbations from 98 images, a budget for two CPU cores; evaluated as
the rows are.

Results, seed 0: 74.6 % clean, 0.0 worst case; the first set took 24.2 % to their class and 6.2
after retraining, the set made then 11.6 (docs/methods.md).
"""

import ml_collections

from experiments import rat
from experiments.configs.methods import cifar10
from rain_jax.config.tree import plain


def get_config() -> ml_collections.ConfigDict:
    """The retraining, of the same network on the same data."""
    sections = plain(cifar10.get_config("natural"))
    sections.update(
        start=dict(classifier="runs/methods/cifar10/natural_0"),
        method=dict(name="rat"),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="constant", peak=0.01),
        average=None,
        rat=dict(number=2, fraction=0.002),
    )
    return rat.config(**sections)
