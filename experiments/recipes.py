"""What several configs share: data, network and threat to begin with, and the methods' sections."""

from typing import Any

from rain_jax.checks import one_of

Sections = dict[str, Any]

# Of the training images, per channel.
CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
MNIST = dict(mean=0.1307, std=0.3081)
STL10 = dict(mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713))
EIGHT = dict(norm="linf", radius=8 / 255)

PGD20 = dict(name="pgd", steps=20, step_size=2 / 255)
# For models that draw, along the mean over draws: what climbs along one draw finds little.
EOT_PGD20 = dict(**PGD20, loss="margin", estimator=dict(name="eot", draws=5))


def cifar10_small(**network: Any) -> Sections:
    """CIFAR-10 and a ResNet-8 of width 16, for two CPU cores; `network` adds to its section."""
    return dict(
        data=dict(name="tfds:cifar10", holdout=1000),
        augment=dict(crop_padding=4, flip=True),
        network=dict(name="preact_resnet", depths=(1, 1, 1), width=16, **CIFAR10, **network),
        threat=EIGHT,
    )


def stl10(crop_padding: int, *, full: bool = False) -> Sections:
    """The cut of STL-10's labelled training images that `prepare` makes, and a PreAct ResNet.

    It has 10 layers and a width of 16 or, if `full`, the 18 layers of the usual one.
    """
    small = dict(name="preact_resnet", depths=(1, 1, 1, 1), width=16, **STL10)
    return dict(
        data=dict(name="tfds:stl10_part", holdout=300),
        augment=dict(crop_padding=crop_padding, flip=True),
        network=dict(name="preact_resnet18", dtype="bfloat16", **STL10) if full else small,
        threat=EIGHT,
    )


def with_changes(sections: Sections, changes: Sections) -> Sections:
    """The sections with the entries of `changes` in place of their own."""
    return {
        **sections,
        **{name: {**sections.get(name, {}), **new} for name, new in changes.items()},
    }


def row(rows: dict[str, Sections], name: str, what: str = "method") -> Sections:
    """What one row of a table changes; a wrong name is met with the right ones."""
    return rows[one_of(what, name, list(rows))]


def method_rows(
    *, radius: float, steps: int, step_size: float, epochs: float
) -> dict[str, Sections]:
    """The training methods in small: for each what it changes in a config that all share.

    One budget for all, `steps` of `step_size` in each attack and `epochs` of training; weights of
    losses are the published ones for CIFAR-10, and epochs at which something changes their share of
    the published run. SENSE-TRADE's `clean_weight` is ours: with the authors' default, none, no
    label is ever seen. So is AFD, whose constants are not published.
    """
    own = dict(steps=steps, step_size=step_size)
    pgd = dict(name="pgd", **own, keep="last")
    kl = {**pgd, "loss": "kl", "start": "normal"}
    noisy = {**pgd, "start": "normal"}
    fgsm = dict(name="fgsm", start="uniform", step_size=1.25 * radius)
    pgd_at = dict(name="adversarial", attack=pgd)
    trades = dict(name="trades", beta=6.0, attack=kl)
    sense = dict(name="sense", threshold=0.5, **own, warmup=epochs / 30)
    milestones = (epochs * 50 / 120, epochs * 90 / 120)
    methods: dict[str, Sections] = {
        "natural": dict(name="natural"),
        "pgd_at": pgd_at,
        "trades": trades,
        "mart": dict(name="mart", beta=5.0, attack=noisy),
        "sense": sense,
        "sense_trade": {**sense, "form": "trade", "clean_weight": 1.0},
        "fat": dict(name="fat", **own, milestones=milestones),
        "fast": dict(name="adversarial", batch_norm="train", attack=fgsm),
        "n_fgsm": dict(name="n_fgsm", noise=2.0),
        "grad_align": dict(name="grad_align", weight=0.2, attack=dict(name="fgsm")),
        "free": dict(name="natural"),
        "awp": {**pgd_at, "awp": dict(gamma=0.01)},
        "trades_awp": {**trades, "awp": dict(gamma=0.005, warmup=epochs * 9 / 200)},
        # From a corner of the ball, which its steps must be able to cross.
        "afd": dict(name="afd", attack={**pgd, "start": "sign"}),
    }
    rows = {name: {"method": method} for name, method in methods.items()}
    # As many backward passes as an epoch's of its replays cost.
    rows["free"]["training"] = dict(replays=8)
    rows["afd"]["network"] = dict(modulation="film")
    return rows
