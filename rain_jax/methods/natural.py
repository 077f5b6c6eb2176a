"""Natural training: cross-entropy on the images as they are."""

import jax

from rain_jax.checks import within
from rain_jax.losses import soft_cross_entropy
from rain_jax.methods.common import outer, right, targets, total
from rain_jax.types import (
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


def natural(network: Network, *, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy with smoothed labels on clean images; the twin that attacks are shown on."""
    within("label_smoothing", label_smoothing, 0.0, below=1.0)

    def objective(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName = None, step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:  # fmt: skip
        seen = outer(network, params, model_state, key, batch, batch.image, axis_name)
        losses = jax.vmap(soft_cross_entropy)(seen.logits, targets(network, batch, label_smoothing))
        return total(batch, losses), (seen.model_state, {"correct": right(batch, seen.logits)})

    return objective
