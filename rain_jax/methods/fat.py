"""Friendly adversarial training: an adversary that stops once the network is wrong."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rain_jax.checks import UsageError, whole, within
from rain_jax.losses import cross_entropy
from rain_jax.methods.common import Staged, finder, fit
from rain_jax.norms import project, random_start
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Image,
    Key,
    LogitsFn,
    ModelState,
    Network,
    Objective,
    Params,
    Scalar,
    Target,
    Threat,
)


def friendly(
    threat: Threat,
    key: Key,
    logits_fn: LogitsFn,
    image: Image,
    label: Target,
    *,
    steps: int,
    step_size: Any,
    patience: Any,
    noise: Any,
) -> Image:
    """PGD from a random start that goes on for `patience` steps once the network is wrong.

    Then it stays where it is, beyond the boundary. With a patience of `steps` it is all of PGD.
    Each step adds `noise` times a normal draw before it is brought back into the threat.
    """
    # As `attacks.pgd` splits it, whose images these are where nothing stops.
    start_key, model_key, noise_key = jax.random.split(key, 3)

    def loss(image: Image, number: Array) -> tuple[Scalar, Array]:
        logits = logits_fn(jax.random.fold_in(model_key, number), image)
        return cross_entropy(logits, label), logits

    def step(carry: tuple[Image, Array, Array], number: Array) -> tuple[Any, None]:
        image_now, left, done = carry
        gradient, logits = jax.grad(loss, has_aux=True)(image_now, number)
        wrong = jnp.argmax(logits) != label
        done = done | (wrong & (left <= 0))
        draw = jax.random.normal(jax.random.fold_in(noise_key, number), image.shape)
        moved = image_now + step_size * threat.norm.steepest(gradient) + noise * draw
        image_now = jnp.where(done, image_now, project(threat, image, moved))
        return (image_now, left - wrong, done), None

    carry = (random_start(threat, start_key, image), jnp.int32(patience), jnp.bool_(False))
    (found, _, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
    return found


def fat(
    network: Network,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float = 0.007,
    noise: float = 0.001,
    patience: tuple[int, ...] = (0, 1, 2),
    milestones: tuple[float, ...] = (50.0, 90.0),
    label_smoothing: float = 0.0,
    steps_per_epoch: int = 1,
) -> Objective:
    """Friendly adversarial training (Zhang et al., arXiv:2002.11242), after the authors' code.

    Cross-entropy on the images of `friendly`, found in evaluation mode. `patience`, their tau, has
    one value more than `milestones`, the epochs at which the next one begins. Their radius is
    0.031.
    """
    whole("steps", steps, 1)
    within("step_size", step_size, above=0.0)
    within("noise", noise, 0.0)
    within("patience", patience, 0)
    within("milestones", milestones)
    if len(patience) != len(milestones) + 1:
        raise UsageError(f"patience={patience}: expected {len(milestones) + 1} numbers, one more "
                         f"than milestones={milestones}")  # fmt: skip
    if list(milestones) != sorted(milestones):
        raise UsageError(f"milestones={milestones}: expected rising epochs")
    begins = jnp.array([math.ceil(epoch * steps_per_epoch) for epoch in milestones], jnp.int32)

    def find(
        params: Params, model_state: ModelState, key: Key, batch: Batch,
        axis_name: AxisName, step: Scalar | int,
    ) -> tuple[Any, ModelState]:  # fmt: skip
        allowed = jnp.array(patience)[jnp.sum(jnp.asarray(step) >= begins)]

        def attack(key: Key, logits_fn: LogitsFn, image: Image, label: Target) -> Image:
            return friendly(
                threat, key, logits_fn, image, label,
                steps=steps, step_size=step_size, patience=allowed, noise=noise,
            )  # fmt: skip

        whole = finder(network, attack, label_smoothing=label_smoothing)
        return whole(params, model_state, key, batch, axis_name, step)

    return Staged(find, fit(network))
