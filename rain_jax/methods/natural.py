"""Natural training: cross-entropy on the images as they are."""

from rain_jax.checks import within
from rain_jax.methods.common import outer_loss
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
        params: Params, model_state: ModelState, key: Key, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        loss, correct, model_state = outer_loss(
            network, params, model_state, key, batch, batch.image, label_smoothing, axis_name
        )
        return loss, (model_state, {"correct": correct})

    return objective
