"""Wang et al., Better diffusion models further improve adversarial training (arXiv:2302.04638).

    python -m experiments.train --config=experiments/configs/published/wang2023.py \
        --config.data.extra=arrays:1m.npz --workdir=runs/wang2023

On CIFAR-10 with a million images by EDM, the file 1m.npz that the authors publish; of 20 or 50
million, merged into one file, `--config.data.extra=arrays:FILE.npz` takes as much memory as there
are pixels. "wrn_70_16" is their larger network.

Settings reproduced from wzekai99/DM-Improves-AT: TRADES with beta 5 and labels smoothed by 0.1,
batch 512 of which 70 % are generated, SGD 0.2 with Nesterov momentum over 400 epochs of 50,000
images, decay 5e-4 on kernels, averaging 0.995 after a warm-up of 2.5 % of the steps, no
normalisation, PGD-10 with steps of 2/255 on KL from a uniform start against the statistics of its
batch, and the best checkpoint by PGD-40 on the margin on 1,024 held-out images. Ours differs in
this: the learning rate rises linearly, theirs by half a cosine, over the same ten epochs, and both
change within epochs; generated images come by permutations, theirs with replacement; batch
statistics decay by 0.9, theirs by 0.99; running averages see attacked images before clean ones.
They report 92.44 % clean and 67.31 % under AutoAttack for the smaller network, with 20 million
images. Not run by us so far: it needs an accelerator.
"""

import ml_collections

from experiments.recipes import EIGHT
from rain_jax.checks import one_of
from rain_jax.config import config

SIZES = {"wrn_28_10": dict(depth=28, width=10), "wrn_70_16": dict(depth=70, width=16)}
TEXTS = tuple(SIZES)


def get_config(network: str = "wrn_28_10") -> ml_collections.ConfigDict:
    """The recipe for one of the two networks."""
    size = SIZES[one_of("network", network, TEXTS)]
    attack = dict(name="pgd", steps=10, step_size=2 / 255, loss="kl", keep="last")
    return config(
        seed=0,
        data=dict(name="tfds:cifar10", holdout=1024, extra="arrays:1m.npz", extra_fraction=0.7),
        augment=dict(crop_padding=4, flip=True),
        network=dict(name="wide_resnet", activation="silu", **size),
        threat=EIGHT,
        method=dict(
            name="trades", beta=5.0, label_smoothing=0.1, batch_norm="batch", attack=attack
        ),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, decay="kernels"),
        schedule=dict(name="cosine", peak=0.2, warmup=10),
        average=dict(decay=0.995, warmup=0.025),
        training=dict(epochs=400, batch_size=512),
        validation=dict(
            every_epochs=1,
            attack=dict(name="pgd", steps=40, step_size=2 / 255, loss="margin"),
            batch_size=512,
        ),
        checkpoints=dict(every_epochs=1),
        evaluation=dict(batch_size=500, suite="standard"),
    )
