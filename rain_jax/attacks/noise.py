"""Random noise: the attack that any other must beat."""

from typing import NamedTuple

import jax.numpy as jnp

from rain_jax.norms import l1, l2, linf, random_start
from rain_jax.remembered import remembered
from rain_jax.types import Image, Iteration, Key, LogitsFn, Scalar, Target, Threat


class Drawn(NamedTuple):
    """An image that is done as soon as it is drawn."""

    image: Image


@remembered
def noise(threat: Threat) -> Iteration:
    """One uniform draw from the ball; a model that it hurts as much as PGD does hides gradients."""

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Drawn:
        return Drawn(random_start(threat, key, image))

    def best(logits_fn: LogitsFn, state: Drawn) -> tuple[Image, Scalar]:
        return state.image, jnp.float32(0.0)  # whether it is misclassified is for the judge

    return Iteration(
        init, lambda _, state: state, best, steps=0, uses="nothing", norms=(linf, l2, l1)
    )
