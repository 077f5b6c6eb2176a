"""SENSE's threshold c, a run for each value and seed, on digits that need no download.

    python -m experiments.sweep --config=experiments/configs/sweep_sense.py --workdir=OUT
    python -m experiments.sweep --config=experiments/configs/sweep_sense.py --workdir=OUT \\
        --shard=1/4

c = 1 is natural training, and 0 is PGD training of what is right at its random start.
"""

from typing import Any

from experiments.build import config, plain


def get_config() -> dict[str, Any]:
    """Twelve short runs, in OUT/cells; each of them is one that the other commands know."""
    cell = config(
        data=dict(name="digits", holdout=200),
        network=dict(name="cnn"),
        threat=dict(norm="linf", radius=0.15),
        method=dict(name="sense", step_size=0.03, warmup=5.0),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.1),
        training=dict(epochs=30, batch_size=64),
        validation=dict(every_epochs=5, attack=dict(name="pgd", steps=10)),
        checkpoints=dict(every_epochs=10),
        evaluation=dict(attacks=dict(pgd40=dict(name="pgd", steps=40, restarts=5))),
    )
    axes = {"method.threshold": [0.25, 0.5, 0.7, 0.9], "seed": [0, 1, 2]}
    return dict(**plain(cell), sweep=dict(train=True, axes=axes))
