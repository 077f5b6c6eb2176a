"""Random noise: the attack that any other must beat."""

from rain_jax.norms import random_start
from rain_jax.types import Attack, Threat


def noise(threat: Threat) -> Attack:
    """One uniform draw from the ball; a model that it hurts as much as PGD does hides gradients."""
    return lambda key, logits_fn, image, label: random_start(threat, key, image)
