"""Training methods on CIFAR-10 by their papers' settings, one row each, for an accelerator.

    for method in natural pgd_at trades mart sense sense_trade fat fast n_fgsm grad_align free awp \
            trades_awp afd; do
        python -m experiments.train \
            --config=experiments/configs/methods/cifar10_resnet18.py:$method \
            --workdir=runs/methods/cifar10_resnet18/$method
    done

Batch size, epochs, learning rate and its milestones, weight decay and the attack are those of the
authors' code, on a PreAct ResNet-18; but SENSE's network is a WRN-34-10, the only one it was
published with. Three settings are the same in all rows, so that they compare: the radius is 8/255
(TRADES, MART and FAT train and test at 0.031), 1,000 training images are held out to choose the
checkpoint by PGD-10 (SENSE and the fast methods take their last), and images are normalised. SENSE
has 300 epochs at c = 0.5, 250 at 0.7, and 200 at 0.1 and 0.3: `--config.method.threshold=0.3
--config.training.epochs=200`. AFD and SENSE-TRADE's clean weight are ours: nothing is published.
Not run by us so far: it needs an accelerator.
"""

import ml_collections

from experiments.recipes import CIFAR10, EIGHT, PGD20, Sections, row, with_changes
from rain_jax.config import config

PGD = dict(name="pgd", steps=10, step_size=2 / 255, keep="last")
NOISY = dict(name="pgd", steps=10, step_size=0.007, start="normal", keep="last")
PGD_AT = dict(name="adversarial", batch_norm="train", attack=PGD)
TRADES = dict(name="trades", beta=6.0, attack={**NOISY, "loss": "kl"})
SENSE = dict(name="sense", threshold=0.5, steps=10, step_size=1.5 / 255, warmup=10)
LAST = dict(checkpoint="latest")


def steps_down(epochs: float, at: tuple[float, ...], peak: float = 0.1, **more: float) -> Sections:
    """`epochs` at whose milestones `at` the rate falls, to a tenth unless `factor` says else."""
    schedule = dict(name="piecewise", peak=peak, at=at, **more)
    return dict(training=dict(epochs=epochs), schedule=schedule)


def cycle(epochs: float, peak: float, rise: float) -> Sections:
    """The one cycle of fast training, whose last weights are taken."""
    schedule = dict(name="one_cycle", peak=peak, rise=rise)
    return dict(training=dict(epochs=epochs), schedule=schedule, evaluation=LAST)


def decay(weight_decay: float) -> Sections:
    return dict(weight_decay=weight_decay)


# Kim & Wang (arXiv:2205.10457), JungeumKim/SENSE: batch 256, reflected borders.
SENSE_RUN = {
    **steps_down(300, (70, 90, 100), factor=0.2),
    "network": dict(name="wrn_34_10"),
    "augment": dict(pad_mode="reflect"),
    "evaluation": LAST,
}
SENSE_RUN["training"]["batch_size"] = 256
# Pang et al. (arXiv:2010.00467); Rice et al. (arXiv:2002.11569), whose AWP is as well.
SHORT, LONG = steps_down(110, (100, 105)), steps_down(200, (100, 150))
ROWS: dict[str, Sections] = {
    "natural": dict(method=dict(name="natural"), validation=dict(attack=None), **LONG),
    "pgd_at": dict(method=PGD_AT, **LONG),
    # Zhang et al. (arXiv:1901.08573), yaodongyu/TRADES
    "trades": dict(method=TRADES, optimiser=decay(2e-4), **steps_down(76, (75,))),
    # Wang et al. (ICLR 2020), YisenWang/MART
    "mart": dict(
        method=dict(name="mart", beta=5.0, attack=NOISY),
        optimiser=decay(3.5e-3),
        **steps_down(120, (75, 90, 100), 0.01),
    ),
    "sense": dict(method=SENSE, **SENSE_RUN),
    "sense_trade": dict(method=dict(SENSE, form="trade", clean_weight=1.0), **SENSE_RUN),
    # Zhang et al. (arXiv:2002.11242), zjfheart/Friendly-Adversarial-Training
    "fat": dict(
        method=dict(name="fat", steps=10, step_size=0.007),
        optimiser=decay(2e-4),
        **steps_down(120, (60, 90, 110)),
    ),
    # Wong et al. (arXiv:2001.03994), locuslab/fast_adversarial
    "fast": dict(
        method=dict(
            name="adversarial",
            batch_norm="train",
            attack=dict(name="fgsm", start="uniform", step_size=10 / 255),
        ),
        **cycle(15, 0.2, 0.5),
    ),
    # de Jorge et al. (arXiv:2202.01181), pdejorge/N-FGSM
    "n_fgsm": dict(method=dict(name="n_fgsm"), **cycle(30, 0.2, 0.5)),
    # Andriushchenko & Flammarion (arXiv:2007.02617), tml-epfl/understanding-fast-adv-training
    "grad_align": dict(
        method=dict(name="grad_align", weight=0.2, attack=dict(name="fgsm")), **cycle(30, 0.3, 0.4)
    ),
    # Shafahi et al. (arXiv:1904.12843), ashafahi/free_adv_train: 80,000 steps, eight on each batch;
    # the rate falls after 40,000 and 60,000.
    "free": with_changes(
        dict(method=dict(name="natural"), optimiser=decay(2e-4), evaluation=LAST),
        dict(
            training=dict(epochs=25.6, replays=8),
            schedule=dict(name="piecewise", peak=0.1, at=(12.8, 19.2)),
        ),
    ),
    # Wu et al. (arXiv:2004.05884), csdongxian/AWP
    "awp": dict(method=dict(PGD_AT, awp=dict(gamma=0.01)), **LONG),
    "trades_awp": dict(method=dict(TRADES, awp=dict(gamma=0.005, warmup=9)), **LONG),
    "afd": dict(
        method=dict(name="afd", attack={**PGD, "start": "sign"}),
        network=dict(modulation="film"),
        **SHORT,
    ),
}
TEXTS = tuple(ROWS)


def get_config(name: str = "pgd_at") -> ml_collections.ConfigDict:
    """The row called `name`; `--config.network.dtype=bfloat16` halves the memory and the time."""
    sections = dict(
        seed=0,
        data=dict(name="tfds:cifar10", holdout=1000),
        augment=dict(crop_padding=4, flip=True),
        network=dict(name="preact_resnet18", **CIFAR10),
        threat=EIGHT,
        optimiser=dict(name="sgd", momentum=0.9, weight_decay=5e-4),
        training=dict(batch_size=128),
        validation=dict(every_epochs=1, attack=dict(name="pgd", steps=10, step_size=2 / 255)),
        checkpoints=dict(every_epochs=1),
        evaluation=dict(
            batch_size=500,
            suite="standard",
            attacks=dict(pgd20=PGD20),
        ),
    )
    return config(**with_changes(sections, row(ROWS, name)))
