"""Adversarial training (Madry et al., arXiv:1706.06083)."""

import jax

from rain_jax.checks import within
from rain_jax.losses import soft_cross_entropy
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


def adversarial(
    network: Network,
    attack: Attack,
    *,
    batch_norm: BatchNorm = "eval",
    label_smoothing: float = 0.0,
) -> Objective:
    """Min over weights of the loss on the images that `attack` finds against those weights.

    `batch_norm` is the mode inside the attack ("eval", "batch" or "train"); the outer pass is
    always in training mode.
    """
    within("label_smoothing", label_smoothing, 0.0, below=1.0)

    def objective(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName = None, step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:  # fmt: skip
        images, model_state = attack_batch(
            network, attack, params, model_state, key, batch,
            batch_norm=batch_norm, axis_name=axis_name,
        )  # fmt: skip
        seen = outer(network, params, model_state, key, batch, images, axis_name)
        losses = jax.vmap(soft_cross_entropy)(seen.logits, targets(network, batch, label_smoothing))
        metrics = {"correct": right(batch, seen.logits), "moved": moved(batch, images)}
        return total(batch, losses), (seen.model_state, metrics)

    return objective
