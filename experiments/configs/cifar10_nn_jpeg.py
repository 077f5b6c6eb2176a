"""NN-favoured JPEG on CIFAR-10: four classifiers, each for its own level, that vote.

    python -m experiments.train --config=experiments/configs/cifar10_natural.py
    python -m experiments.analyse --workdir=runs/cifar10_natural
    python -m experiments.train --config=experiments/configs/cifar10_nn_jpeg.py
    for variant in nn_420 nn_3 nn_2 nn_1 std std_1; do
        python -m experiments.train --config=experiments/configs/cifar10_nn_jpeg.py:$variant \
            --workdir=runs/nn_jpeg/$variant
    done

Zhang & Gao (arXiv:2106.13394), reconstructed from the abstract: tables, levels and schedule are our
own. The members learn side by side from one naturally trained classifier. Variants have fewer
levels, chroma at half the resolution, or JPEG's own tables, at qualities of SHIELD's members
(`cifar10_ablations` beside this file has some of them untrained).
"""

from typing import Any

import ml_collections

from experiments.recipes import PGD20, cifar10_small, row
from rain_jax.config import config

OWN = dict(name="nn_jpeg", table="nn", statistics="runs/cifar10_natural/statistics.npz")


def _levels(*values: float, **defence: Any) -> dict[str, Any]:
    """A member for each level; one alone is no ensemble."""
    if len(values) == 1:
        return dict(defence={**OWN, **defence, "level": values[0]})
    return dict(defence={**OWN, **defence}, ensemble=dict(key="defence.level", values=values))


VARIANTS: dict[str, dict[str, Any]] = {
    "nn": _levels(15.0, 30.0, 45.0, 60.0),
    "nn_420": _levels(15.0, 30.0, 45.0, 60.0, subsampling="420"),
    "nn_3": _levels(15.0, 30.0, 45.0),
    "nn_2": _levels(15.0, 30.0),
    "nn_1": _levels(30.0),
    "std": dict(
        defence=dict(name="jpeg"),
        ensemble=dict(key="defence.quality", values=(80.0, 60.0, 40.0, 20.0)),
    ),
    "std_1": dict(defence=dict(name="jpeg", quality=60)),
}
TEXTS = tuple(VARIANTS)


def get_config(variant: str = "nn") -> ml_collections.ConfigDict:
    """Tables from what the classifier feels of each frequency; SGD 1e-2, cosine, two epochs."""
    return config(
        seed=0,
        **cifar10_small(),
        **row(VARIANTS, variant, "variant"),
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
            attacks=dict(pgd20=PGD20, pgd20_identity={**PGD20, "through": "identity"}),
        ),
    )
