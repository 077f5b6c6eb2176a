"""Training methods on CIFAR-10 at L-inf 8/255, one row of a table each, for two CPU cores.

    for method in natural pgd_at trades mart sense sense_trade fat fast n_fgsm grad_align free awp \
            trades_awp afd pgd_at_jpeg; do
        python -m experiments.train --config=experiments/configs/methods/cifar10.py:$method \
            --workdir=runs/methods/cifar10/$method
    done

The network of `cifar10_small.py`, two epochs, attacks of three steps: what two cores do in ten
minutes a row, and far from converged. As on MNIST rows differ in their method alone, the last
checkpoint is taken, and the budgets are ours: for the papers' own see `cifar10_resnet18.py` beside
this file. `pgd_at_jpeg` trains through JPEG, and is attacked through it, in training and after.
Evaluated on the first 500 test images under PGD-50 with 2 restarts, targeted APGD (50 steps for
each of 9 classes) and Square (1,000 queries). For other seeds `--config.seed=1`; for SENSE's
trade-off `--config.method.threshold=0.3` (the paper's c), for that of TRADES
`--config.method.beta=3`, for AFD's `--config.evaluation.condition=0.5` of `experiments.evaluate`.
Any defence goes in front of any method: `--config.defence.name=jpeg`.

Results in per cent, clean and worst case, seed 0: natural 69.4, 0.0; pgd_at 46.6, 24.4; trades
51.0, 24.0; sense 68.2, 1.4; afd 41.6, 11.0; fat 51.8, 24.6; n_fgsm 45.0, 24.4; fast 45.4, 24.6;
free 49.6, 27.8; mart 39.4, 23.6; sense_trade 65.6, 6.2; grad_align 44.4, 24.0; awp 40.8, 24.2;
trades_awp 49.2, 24.4; pgd_at_jpeg 49.0, 21.6 (docs/methods.md).
"""

import ml_collections

from experiments.recipes import cifar10_small, method_rows, row, with_changes
from rain_jax.config import config

EPOCHS = 2
ROWS = method_rows(radius=8 / 255, steps=3, step_size=4 / 255, epochs=EPOCHS)
PGD50 = dict(name="pgd", steps=50, step_size=2 / 255, restarts=2)
ATTACKS = dict(
    pgd50=PGD50,
    apgd_t=dict(name="apgd_t", steps=50),
    square=dict(name="square", queries=1000),
)
ROWS["pgd_at_jpeg"] = {
    **ROWS["pgd_at"],
    "defence": dict(name="jpeg", quality=75),
    "evaluation": dict(attacks={**ATTACKS, "pgd50_identity": {**PGD50, "through": "identity"}}),
}
TEXTS = tuple(ROWS)


def get_config(name: str = "pgd_at") -> ml_collections.ConfigDict:
    """The row called `name`: a ResNet-8 of width 16."""
    sections = dict(
        seed=0,
        **cifar10_small(),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.2),
        average=dict(decay=0.995),
        training=dict(epochs=EPOCHS, batch_size=128),
        checkpoints=dict(every_epochs=0.5, keep_best=False),
        evaluation=dict(
            batch_size=250,
            images=500,
            checkpoint="latest",
            attacks=ATTACKS,
        ),
    )
    return config(**with_changes(sections, row(ROWS, name)))
