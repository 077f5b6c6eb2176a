"""MART: adversarial training that weighs images by how unsure the network is of them."""

import jax
import jax.numpy as jnp

from rain_jax.checks import within
from rain_jax.losses import cross_entropy, kl, largest
from rain_jax.methods.common import BatchNorm, Found, Staged, finder, moved, outer, right, total
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Key,
    Logits,
    Metrics,
    ModelState,
    Network,
    Objective,
    Params,
    Scalar,
)

# As in the authors' code, against the logarithm of zero and a weight of zero.
_CERTAIN, _TINY, _WEIGHT = 1.0001, 1e-12, 1.0000001


def boosted_cross_entropy(logits: Logits, label: Array) -> Scalar:
    """CE - log(1 - the largest wrong probability): pushes the runner-up down as well."""
    probabilities = jax.nn.softmax(logits)
    wrong = jnp.where(jnp.arange(logits.shape[-1]) == label, -1.0, probabilities)
    return cross_entropy(logits, label) - jnp.log(_CERTAIN - largest(wrong) + _TINY)


def mart(
    network: Network, attack: Attack, *, beta: float = 5.0, batch_norm: BatchNorm = "eval"
) -> Objective:
    """BCE(f(x'), y) + beta KL(f(x) || f(x')) (1 - f(x)_y), x' from `attack` (MART, ICLR 2020).

    `beta` is the authors' lambda, 5 for ResNet-18 and 6 for WRN-34-10. Their attack climbs
    cross-entropy, 10 steps of 0.007 from a thousandth of normal noise at radius 0.031. Gradients go
    through both predictions and through the weight; running averages see x and then x'.
    """
    within("beta", beta, 0.0)

    def learn(
        params: Params, model_state: ModelState, key: Key, found: Found, axis_name: AxisName
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        batch = found.batch
        clean = outer(network, params, model_state, key, batch, batch.image, axis_name)
        attacked = outer(network, params, clean.model_state, key, batch, found.images, axis_name)

        def loss(attacked: Logits, clean: Logits, label: Array) -> Scalar:
            unsure = _WEIGHT - jax.nn.softmax(clean)[label]
            return boosted_cross_entropy(attacked, label) + beta * kl(attacked, clean) * unsure

        metrics = {
            "correct": right(batch, clean.logits),
            "standing": right(batch, attacked.logits),
            "moved": moved(batch, found.images),
        }
        losses = jax.vmap(loss)(attacked.logits, clean.logits, batch.label)
        return total(batch, losses), (attacked.model_state, metrics)

    return Staged(finder(network, attack, batch_norm=batch_norm), learn)
