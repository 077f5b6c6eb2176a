"""Adversarial training (Madry et al., arXiv:1706.06083)."""

import jax.numpy as jnp

from rain_jax.checks import within
from rain_jax.methods.common import BatchNorm, attack_batch, outer_loss
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
        params: Params, model_state: ModelState, key: Key, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        images, model_state = attack_batch(
            network, attack, params, model_state, key, batch,
            batch_norm=batch_norm, axis_name=axis_name,
        )  # fmt: skip
        loss, correct, model_state = outer_loss(
            network, params, model_state, key, batch, images, label_smoothing, axis_name
        )
        moved = jnp.max(jnp.abs(images - batch.image), axis=(1, 2, 3))
        return loss, (model_state, {"correct": correct, "moved": jnp.sum(batch.valid * moved)})

    return objective
