"""Clean against robust accuracy: SENSE over c, TRADES over beta and PGD training, three seeds each.

    for method in sense trades pgd_at; do
        python -m experiments.sweep --config=experiments/configs/sweep_tradeoff.py:$method \\
            --workdir=runs/tradeoff/$method
    done
    python -m experiments.report runs/tradeoff/*/cells/* --out=runs/tradeoff/report
    python -m experiments.sweep --config=experiments/configs/sweep_tradeoff.py:sense \\
        --config.sweep.side_by_side --workdir=OUT        one program trains all twelve
    python -m experiments.sweep --config=experiments/configs/sweep_tradeoff.py:sense \\
        --workdir=OUT --shard=1/4                        a quarter of them

On digits that need no download. c = 1 is natural training, and 0 is PGD training of what is right
at its random start.
"""

from typing import Any

from experiments.recipes import row
from rain_jax.config.tree import config, plain

SEEDS = [0, 1, 2]
PGD = dict(name="pgd", steps=10, step_size=0.03, keep="last")
METHODS: dict[str, dict[str, Any]] = {
    "sense": dict(
        method=dict(name="sense", step_size=0.03, warmup=5.0),
        axes={"method.threshold": [0.25, 0.5, 0.7, 0.9], "seed": SEEDS},
    ),
    "trades": dict(
        method=dict(name="trades", attack={**PGD, "loss": "kl", "start": "normal"}),
        axes={"method.beta": [1.0, 3.0, 6.0, 12.0], "seed": SEEDS},
    ),
    "pgd_at": dict(method=dict(name="adversarial", attack=PGD), axes={"seed": SEEDS}),
}


def get_config(method: str = "sense") -> dict[str, Any]:
    """Short runs in OUT/cells; each of them is one that the other commands know."""
    chosen = row(METHODS, method)
    cell = config(
        data=dict(name="digits", holdout=200),
        network=dict(name="cnn"),
        threat=dict(norm="linf", radius=0.15),
        method=chosen["method"],
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.1),
        training=dict(epochs=30, batch_size=64),
        validation=dict(every_epochs=5, attack=dict(name="pgd", steps=10)),
        checkpoints=dict(every_epochs=10),
        evaluation=dict(
            attacks=dict(
                pgd40=dict(name="pgd", steps=40, restarts=5),
                apgd_t=dict(name="apgd_t", steps=50),
                square=dict(name="square", queries=1000),
            )
        ),
    )
    return dict(**plain(cell), sweep=dict(train=True, axes=chosen["axes"]))
