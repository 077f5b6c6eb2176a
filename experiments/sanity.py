"""Mistakes of a deployed model that are refused before it is evaluated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.adapters import of_network
from rain_jax.checks import UsageError
from rain_jax.evaluation import Evaluation, probe
from rain_jax.types import Network, PyTree

# Changes of most images' logits with their batch, relative to how logits spread. Rounding in
# bfloat16, or one that tips over in a quantised model, moves less, or fewer of them.
_BATCHED = 0.05


def refuse(network: Network, variables: PyTree, images: Any) -> None:
    """What `probe.refuse` does, and a network that couples the images of a batch.

    `images` are a few, float32 [N, H, W, C] in [0, 1]; of a single one it cannot be told whether
    others in its batch matter to it.
    """
    # Whether it uses keys is the question, so it gets some.
    model = of_network(network._replace(random=True), variables)
    # One key for all: a model that draws once for a whole batch (as RAIN's authors do) has the same
    # law for each image whatever its neighbours, and only its draw is another.
    draws = jax.random.split(jax.random.key(0))
    keys = jnp.broadcast_to(draws[:, None], (2, len(images)))
    alone = probe.refuse(model._replace(random=network.random), keys, images)
    all_ = jax.jit(lambda v, keys, x: network.apply(v, x, train=False, keys=keys)[0])
    together = np.asarray(all_(variables, keys[0], images))
    apart = float(np.median(np.max(np.abs(alone - together), axis=1)))
    if apart > _BATCHED * np.std(alone):
        raise UsageError(
            f"an image's logits change by {apart:.3g} with the other images of its batch: "
            "expected a model in evaluation mode"
        )


def refuse_mistakes(network: Network, evaluation: Evaluation) -> None:
    """Asks the deployed model about a few test images, and refuses what `refuse` does."""
    variables = jax.device_put(jax.tree.map(np.asarray, evaluation.model.variables))
    refuse(network, variables, probe.few_of(evaluation))
