"""Parts of RAIN and NN-JPEG, and the baselines, in front of one natural classifier of CIFAR-10.

    python -m experiments.train --config=experiments/configs/cifar10_natural.py
    python -m experiments.analyse --workdir=runs/cifar10_natural
    for part in picks-shift picks shift jpeg nn_jpeg nn_jpeg_vote jpeg_vote \
            bit_depth median total_variation resize_and_pad shield feature_distillation; do
        python -m experiments.adopt --config=experiments/configs/cifar10_ablations.py:$part \
            --workdir=runs/ablations/$part
        python -m experiments.evaluate --config=experiments/configs/ladder.py:small \
            --workdir=runs/ablations/$part
    done

What each part does by itself, where nothing has learned to live with it: RAIN's random picks and
shift, with bicubic interpolation in the place of its network; JPEG at quality 75, the network's own
table at level 30, and votes over four levels of either. The authors' shifts, of up to 5 % of the
halved image, are less than a pixel here, so that RAIN does not shift 32x32 images at all: 10 %, a
pixel, stands for them. The whole, which learns, is `cifar10_rain` and `cifar10_nn_jpeg` beside this
file. The baselines are what their authors, or those who broke them, had, see
`rain_jax.defences.baselines` and `jpeg`.
"""

from typing import Any

import ml_collections

from experiments.recipes import PGD20, cifar10_small, row
from rain_jax.config import config

BICUBIC = dict(name="rain", upscaler=dict(name="bicubic"), reach=0.1)
OWN_TABLE = dict(name="nn_jpeg", table="nn", statistics="runs/cifar10_natural/statistics.npz")
PARTS: dict[str, dict[str, Any]] = {
    "picks-shift": dict(defence=BICUBIC),
    "picks": dict(defence={**BICUBIC, "reach": 0.0}),
    "shift": dict(defence={**BICUBIC, "down": "bicubic"}),
    "jpeg": dict(defence=dict(name="jpeg", quality=75)),
    "nn_jpeg": dict(defence={**OWN_TABLE, "level": 30.0}),
    "nn_jpeg_vote": dict(
        defence=OWN_TABLE,
        ensemble=dict(key="defence.level", values=(15.0, 30.0, 45.0, 60.0)),
    ),
    "jpeg_vote": dict(  # the qualities of SHIELD's members
        defence=dict(name="jpeg"),
        ensemble=dict(key="defence.quality", values=(80.0, 60.0, 40.0, 20.0)),
    ),
    **{
        name: dict(defence=dict(name=name))
        for name in (
            "bit_depth",
            "median",
            "total_variation",
            "resize_and_pad",
            "shield",
            "feature_distillation",
        )
    },
}
TEXTS = tuple(PARTS)


def get_config(part: str = "picks-shift") -> ml_collections.ConfigDict:
    """One part; its evaluation is the ladder's, or PGD-20 along the mean over draws."""
    return config(
        seed=0,
        **cifar10_small(),
        **row(PARTS, part, "part"),
        start=dict(classifier="runs/cifar10_natural"),
        method=dict(name="natural"),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="cosine", peak=1e-2),
        training=dict(epochs=2, batch_size=128),
        evaluation=dict(
            batch_size=100,
            images=1000,
            eight_bit=True,
            attacks=dict(pgd20=PGD20),
        ),
    )
