"""TRADES: natural accuracy, and a prediction that does not change within the threat."""

import jax

from rain_jax.checks import within
from rain_jax.losses import kl, soft_cross_entropy
from rain_jax.methods.common import BatchNorm, attack_batch, moved, outer, right, targets, total
from rain_jax.types import (
    Attack,
    AxisName,
    Batch,
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
) -> Objective:
    """CE(f(x), y) + beta KL(f(x) || f(x')) (Zhang et al., arXiv:1901.08573), x' from `attack`.

    Theirs climbs the same KL from a thousandth of normal noise: `dict(name="pgd", loss="kl",
    start="normal", steps=10, step_size=0.007, keep="last")` at radius 0.031. The gradient goes
    through both predictions. Running averages see x' and then x; the authors' code passes x once
    more, before x'.
    """
    within("beta", beta, 0.0)
    within("label_smoothing", label_smoothing, 0.0, below=1.0)

    def objective(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName = None, step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:  # fmt: skip
        images, model_state = attack_batch(
            network, attack, params, model_state, key, batch,
            batch_norm=batch_norm, axis_name=axis_name,
        )  # fmt: skip
        attacked = outer(network, params, model_state, key, batch, images, axis_name)
        clean = outer(network, params, attacked.model_state, key, batch, batch.image, axis_name)
        natural = jax.vmap(soft_cross_entropy)(
            clean.logits, targets(network, batch, label_smoothing)
        )
        change = jax.vmap(kl)(attacked.logits, clean.logits)
        metrics = {
            "correct": right(batch, clean.logits),
            "standing": right(batch, attacked.logits),
            "kl": total(batch, change),
            "moved": moved(batch, images),
        }
        return total(batch, natural + beta * change), (clean.model_state, metrics)

    return objective
