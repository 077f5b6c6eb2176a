"""AFD's three ingredients, with and without: 2 x 3 x 2 runs of a small network on CIFAR-10.

    for run in {sign,uniform}-{post,pre,none}-{film,none}; do
        python -m experiments.train --config=experiments/configs/afd/ablation.py:$run \
            --workdir=runs/afd/$run
    done

The text is start-mixing-modulation; "float" takes the place of "film" too. For two CPU cores: the
network and schedule of cifar10_small.py. AFD itself names neither network nor data set nor number,
so this is a study of its parts and no reproduction. Nothing has been measured yet.
"""

import ml_collections

from experiments.recipes import PGD20, cifar10_small
from rain_jax.checks import UsageError, one_of
from rain_jax.config import config

STARTS, STAGES = ("sign", "uniform"), ("post", "pre", "none")
MODULATIONS = ("film", "float", "none")


def get_config(run: str = "sign-post-film") -> ml_collections.ConfigDict:
    """One run of the ablation; evaluated at the condition 1, which `deployed` in `method` is."""
    parts = run.split("-")
    if len(parts) != 3:
        raise UsageError(f"{run!r}: expected start-mixing-modulation, such as sign-post-film")
    start = one_of("start", parts[0], STARTS)
    stage = one_of("mixing", parts[1], STAGES)
    modulation = one_of("modulation", parts[2], MODULATIONS)
    return config(
        seed=0,
        **cifar10_small(modulation=modulation),
        method=dict(
            name="afd",
            mix_stage=stage,
            # A corner is 16/255 from the opposite one: steps must be able to cross the ball.
            attack=dict(name="pgd", start=start, steps=10, step_size=2 / 255, keep="last"),
        ),
        optimiser=dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=dict(name="one_cycle", peak=0.2),
        average=dict(decay=0.995),
        training=dict(epochs=7, batch_size=128),
        validation=dict(
            every_epochs=1, attack=dict(name="pgd", steps=10, step_size=2 / 255), batch_size=250
        ),
        checkpoints=dict(every_epochs=0.5),
        evaluation=dict(batch_size=250, attacks=dict(pgd20=PGD20)),
    )
