"""TRADES: natural accuracy, and a prediction that does not change within the threat."""

import jax

from rain_jax.checks import within
from rain_jax.losses import kl, soft_cross_entropy
from rain_jax.methods.common import BatchNorm, Found, Staged, finder, moved, outer, right, total
from rain_jax.methods.mixing import Mix
from rain_jax.types import (
    Attack,
    AxisName,
    Key,
    Metrics,
    ModelState,
    Network,
    Objective,
    Params,
    Scalar,
)


def trades(
    network: Network,
    attack: Attack,
    *,
    beta: float = 6.0,
    batch_norm: BatchNorm = "eval",
    label_smoothing: float = 0.0,
    mix: Mix = "none",
    mix_alpha: float = 1.0,
) -> Objective:
    """CE(f(x), y) + beta KL(f(x) || f(x')) (Zhang et al., arXiv:1901.08573), x' from `attack`.

    Theirs climbs the same KL from a thousandth of normal noise: `dict(name="pgd", loss="kl",
    start="normal", steps=10, step_size=0.007, keep="last")` at radius 0.031. The gradient goes
    through both predictions. Running averages see x' and then x; the authors' code passes x once
    more, before x'. `mix` mixes images before the attack (see `mixing.mixed`), as Rebuffi et al.
    (arXiv:2103.01946) do with CutMix: the KL that this attack climbs needs no label.
    """
    within("beta", beta, 0.0)

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Found, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch = found.batch
        attacked = outer(network, params, model_state, key, batch, found.images, axis_name)
        clean = outer(network, params, attacked.model_state, key, batch, batch.image, axis_name)
        natural = jax.vmap(soft_cross_entropy)(clean.logits, found.targets)
        change = jax.vmap(kl)(attacked.logits, clean.logits)
        metrics = {
            "correct": right(batch, clean.logits),
            "standing": right(batch, attacked.logits),
            "kl": total(batch, change),
            "moved": moved(batch, found.images),
        }
        return total(batch, natural + beta * change), (clean.model_state, metrics)

    find = finder(
        network, attack, batch_norm=batch_norm, label_smoothing=label_smoothing,
        mix=mix, mix_alpha=mix_alpha,
    )  # fmt: skip
    return Staged(find, learn)
