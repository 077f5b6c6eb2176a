"""RAIN on STL-10, the data of its authors, in front of a naturally trained classifier.

    python -m experiments.train --config=experiments/configs/stl10_natural.py
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr_small.py
    python -m experiments.train --config=experiments/configs/stl10_rain.py

Du et al. (arXiv:2004.14798), after the authors' code, with a small EDSR at a size for two CPU
cores. With `:full` their own, for a GPU: EDSR of 16 blocks of 64 channels (`upscaling/edsr.py`),
one shift for all images of a batch, batch statistics of the frozen classifier that drift, 250
epochs, their rates; the classifier is that of `stl10_natural.py:full`. Their weights, where the
file is at hand: `--config.start.defence=FILE.npz`.

    python -m experiments.train --config=experiments/configs/stl10_natural.py:full \
        --workdir=runs/stl10_natural_full
    python -m experiments.upscale --config=experiments/configs/upscaling/edsr.py --workdir=runs/edsr
    python -m experiments.train --config=experiments/configs/stl10_rain.py:full \
        --workdir=runs/stl10_rain_full

Seed 0, single passes over 40 test images: 63.0 % right, 0.0 in the worst case over the ladder
(docs/defences.md). "full": 75.7 of the first 100, and 0.9 in the worst case (docs/gpu.md).
"""

import ml_collections

from experiments.recipes import EOT_PGD20, stl10
from rain_jax.checks import one_of
from rain_jax.config import config


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """SGD with the authors' momentum and weight decay; a larger rate for fewer epochs, if small."""
    full = one_of("size", size, ("small", "full")) == "full"
    upscaler = (
        dict(name="edsr", dtype="bfloat16") if full else dict(name="edsr", blocks=4, width=32)
    )
    classifier = "runs/stl10_natural_full" if full else "runs/stl10_natural"
    edsr = "runs/edsr" if full else "runs/edsr_small"
    piecewise = dict(name="piecewise", peak=1e-4, at=(150.0, 175.0, 225.0), factor=0.2)
    return config(
        seed=0,
        **stl10(crop_padding=4, full=full),
        defence=dict(name="rain", shared_shift=full, upscaler=upscaler),
        start=dict(classifier=classifier, defence=edsr, trained="defence", drift=full),
        method=dict(name="natural"),
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        schedule=piecewise if full else dict(name="cosine", peak=1e-3),
        training=dict(epochs=250 if full else 5, batch_size=128 if full else 64),
        validation=dict(every_epochs=25 if full else 1, batch_size=100),
        checkpoints=dict(every_epochs=25 if full else 1),
        evaluation=dict(
            batch_size=50,
            images=100,
            eight_bit=True,
            attacks=dict(
                eot_pgd20=EOT_PGD20,
                eot_pgd20_means={**EOT_PGD20, "through": "average_one_shift"},
            ),
        ),
    )
