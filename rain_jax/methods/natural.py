"""Natural training: cross-entropy on the images as they are."""

import jax

from rain_jax.losses import soft_cross_entropy
from rain_jax.methods.common import Found, Staged, finder, outer, right, total
from rain_jax.methods.mixing import Mix
from rain_jax.types import AxisName, Key, Metrics, ModelState, Network, Objective, Params, Scalar


def natural(
    network: Network,
    *,
    label_smoothing: float = 0.0,
    mix: Mix = "none",
    mix_alpha: float = 1.0,
) -> Objective:
    """Cross-entropy with smoothed labels on clean images; the twin that attacks are shown on.

    `mix` is "mixup" or "cutmix", with shares drawn from Beta(`mix_alpha`, `mix_alpha`) (see
    `mixing.mixed`).
    """

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Found, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        seen = outer(network, params, model_state, key, found.batch, found.images, axis_name)
        losses = jax.vmap(soft_cross_entropy)(seen.logits, found.targets)
        correct = right(found.batch, seen.logits)
        return total(found.batch, losses), (seen.model_state, {"correct": correct})

    find = finder(network, None, label_smoothing=label_smoothing, mix=mix, mix_alpha=mix_alpha)
    return Staged(find, learn)
