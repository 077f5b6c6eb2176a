"""DeepFool: to the nearest linear boundary, again and again (arXiv:1511.04599)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.attacks.nearest import Nearest, known, nearer, none_yet, score, within_threat
from rain_jax.checks import whole, within
from rain_jax.gradients import last_finite, usable
from rain_jax.losses import margin
from rain_jax.norms import l1, l2, linf
from rain_jax.remembered import remembered
from rain_jax.types import (
    Array,
    Estimator,
    Image,
    Iteration,
    Key,
    Logits,
    LogitsFn,
    Scalar,
    Target,
    Threat,
)

# By how much each moved pixel aims past a boundary: one exactly on it would never leave it.
_PAST = 1e-6


class Boundary(NamedTuple):
    """The nearest linear boundary seen from an image: a class against the label."""

    slope: Image  # of that class's lead over the label
    level: Scalar  # what the lead lacks, or where it is positive has too much, to lie just past it
    logits: Logits


def wrong_classes(logits: Logits, label: Target) -> Array:
    """All classes but the label, int32 [K - 1], the likeliest first."""
    wrong = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return jnp.argsort(-wrong)[:-1].astype(jnp.int32)


def mean_logits(estimate: Estimator, logits_fn: LogitsFn, key: Key, image: Image) -> Logits:
    """The mean logits over the estimator's draws, without a backward pass."""
    (_, logits), _ = estimate(lambda key, image: (jnp.float32(0.0), logits_fn(key, image)))(
        key, image
    )
    return logits


def nearest_boundary(
    threat: Threat,
    estimate: Estimator,
    logits_fn: LogitsFn,
    key: Key,
    image: Image,
    label: Target,
    classes: Array,
) -> Boundary:
    """The nearest of the boundaries to `classes` [M], were the model linear and without bounds.

    One forward pass, and a backward pass and a gradient for each class.
    """

    def lead(place: Array) -> Any:
        def value(key: Key, image: Image) -> tuple[Scalar, Logits]:
            logits = logits_fn(key, image)
            return jnp.float32(logits[place] - logits[label]), logits

        return estimate(value)(key, image)

    (leads, logits), slopes = jax.vmap(lead)(classes)
    steps = jax.vmap(threat.norm.steepest)(slopes)
    # Sums and not products of matrices, which accelerators round to fewer bits.
    dual = jnp.sum(slopes * steps, axis=range(1, slopes.ndim))
    distances = jnp.abs(leads) / jnp.where(dual > 0, dual, 1.0)
    nearest = jnp.argmin(jnp.where(dual > 0, distances, jnp.inf))
    past = _PAST * jnp.sum(slopes[nearest] * jnp.sign(steps[nearest]))
    return Boundary(slopes[nearest], past - leads[nearest], logits[0])


class Fooling(NamedTuple):
    """Where one image's way stands."""

    key: Key  # for the model's randomness, one fold for each step
    clean: Image
    target: Target
    classes: Array  # int32 [M], whose boundaries are looked at
    image: Image
    nearest: Nearest
    done: Scalar  # int32, steps


@remembered
def deepfool(
    threat: Threat,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    estimator: Estimator | None = None,
) -> Iteration:
    """DeepFool (Moosavi-Dezfooli et al., arXiv:1511.04599), in L-inf, L2 and L1.

    Each step goes to the nearest boundary among the `candidates` likeliest classes of the clean
    image, the label among them, as they would lie were the model linear, and by the share
    `overshoot` farther. The first misclassified image is the answer: at a finite radius pulled
    into the threat, at an infinite one as it is. Unlike the paper's, steps are the smallest that
    lead there within the pixel bounds.

    Raises `UsageError` for fewer than one step or two candidates, or a negative overshoot.
    """
    whole("steps", steps, 1)
    whole("candidates", candidates, 2)
    within("overshoot", overshoot, 0.0)
    estimate = usable(estimator)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Fooling:
        start_key, key = jax.random.split(key)
        logits = mean_logits(estimate, logits_fn, start_key, image)
        classes = wrong_classes(logits, target)[: candidates - 1]
        nearest = nearer(threat, image, none_yet(image), image, margin(logits, target) > 0)
        return Fooling(key, image, target, classes, image, nearest, jnp.int32(0))

    def judge(state: Fooling, logits: Logits) -> Nearest:
        broken = margin(logits, state.target) > 0
        return nearer(threat, state.clean, state.nearest, state.image, broken)

    def step(logits_fn: LogitsFn, state: Fooling) -> Fooling:
        key = jax.random.fold_in(state.key, state.done)
        slope, level, logits = nearest_boundary(
            threat, estimate, logits_fn, key, state.image, state.target, state.classes
        )
        nearest = judge(state, logits)
        change = threat.norm.cross(
            slope, level, threat.low - state.image, threat.high - state.image
        )
        moved = jnp.clip(state.image + (1.0 + overshoot) * change, threat.low, threat.high)
        moved = last_finite(moved, state.image)
        found = jnp.isfinite(nearest.distance)
        return state._replace(
            image=jnp.where(found, state.image, moved), nearest=nearest, done=state.done + 1
        )

    def best(logits_fn: LogitsFn, state: Fooling) -> tuple[Image, Scalar]:
        last_key, found_key = jax.random.split(jax.random.fold_in(state.key, state.done))
        nearest = judge(state, mean_logits(estimate, logits_fn, last_key, state.image))
        found = within_threat(threat, state.clean, nearest, state.image)
        lead = margin(mean_logits(estimate, logits_fn, found_key, found), state.target)
        # Pulled into the threat, an image found beyond it may still be misclassified.
        nearest = nearer(threat, state.clean, nearest, found, lead > 0)
        return found, score(threat, nearest, lead)

    return Iteration(
        init, step, best, steps, seen=lambda state: known(threat, state.nearest),
        uses=estimate.uses, draws=estimate.draws, norms=(linf, l2, l1), minimum_norm=True,
    )  # fmt: skip
