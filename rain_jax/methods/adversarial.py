"""Adversarial training (Madry et al., arXiv:1706.06083)."""

from rain_jax.methods.common import BatchNorm, Staged, finder, fit
from rain_jax.methods.mixing import Mix
from rain_jax.types import Attack, Network, Objective


def adversarial(
    network: Network,
    attack: Attack,
    *,
    batch_norm: BatchNorm = "eval",
    label_smoothing: float = 0.0,
    mix: Mix = "none",
    mix_alpha: float = 1.0,
) -> Objective:
    """Min over weights of the loss on the images that `attack` finds against those weights.

    `batch_norm` is the mode inside the attack ("eval", "batch" or "train"); the outer pass is
    always in training mode. With `attack=dict(name="fgsm", start="uniform", step_size=10 / 255)`
    and "train" it is Fast-AT (Wong et al., arXiv:2001.03994), at a radius of 8 / 255.

    `mix` mixes images before the attack (see `mixing.mixed`). The loss then has both labels and the
    attack climbs away from that of the larger share; Rice et al. (arXiv:2002.11569) climb the
    mixed loss.
    """
    find = finder(
        network, attack, batch_norm=batch_norm, label_smoothing=label_smoothing,
        mix=mix, mix_alpha=mix_alpha,
    )  # fmt: skip
    return Staged(find, fit(network))
