"""Carlini & Wagner's attacks: distance and margin in one loss, descended by Adam in tanh space."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rain_jax.attacks.deepfool import mean_logits
from rain_jax.attacks.nearest import Nearest, known, nearer, none_yet, score, within_threat
from rain_jax.checks import whole, within
from rain_jax.gradients import last_finite, usable
from rain_jax.losses import margin
from rain_jax.norms import expect, l2, linf
from rain_jax.remembered import remembered
from rain_jax.types import (
    Array,
    Estimator,
    Image,
    Iteration,
    Key,
    Logits,
    LogitsFn,
    PyTree,
    Scalar,
    Target,
    Threat,
)

_NORMS = l2, linf
# How near tanh comes to the pixel bounds: in float32 it is flat beyond, and a pixel that went
# there would never come back.
_END = 1.0 - 1e-6
# A constant that fails grows by this factor; above the largest, L-inf gives a bound up.
_GROWTH, _LARGEST = 10.0, 20.0
# The next L-inf bound as a share of the smallest distance so far.
_SHRINK = 0.9


class Trial(NamedTuple):
    """What one round tries, and what the rounds before it say."""

    constant: Scalar  # the margin's weight against the distance
    bound: Scalar  # L-inf: changes larger than this are penalised
    failed: Scalar  # the largest that was not enough: constant in L2, bound in L-inf
    enough: Scalar  # L2: the smallest constant that was enough


class Descent(NamedTuple):
    """Where one image's search stands."""

    key: Key  # for the model's randomness, one fold for each step
    clean: Image
    target: Target
    image: Image
    point: Array  # the image in tanh space
    adam: PyTree
    trial: Trial
    succeeded: Scalar  # bool, whether this round has met a broken image
    taken: Scalar  # int32, steps in this round
    done: Scalar  # int32, steps in all
    nearest: Nearest


def _next_constant(trial: Trial, succeeded: Scalar) -> Trial:
    """L2: between the largest constant that failed and the smallest that was enough."""
    failed = jnp.where(succeeded, trial.failed, jnp.maximum(trial.failed, trial.constant))
    enough = jnp.where(succeeded, jnp.minimum(trial.enough, trial.constant), trial.enough)
    grown = trial.constant * _GROWTH
    constant = jnp.where(jnp.isfinite(enough), (failed + enough) / 2, grown)
    return trial._replace(constant=constant, failed=failed, enough=enough)


def _next_bound(
    trial: Trial, succeeded: Scalar, distance: Scalar, radius: Any, initial: float
) -> Trial:
    """L-inf: below the smallest distance so far, above the largest bound that failed.

    A bound fails with the last of the constants.
    """
    grown = trial.constant * _GROWTH
    spent = grown > _LARGEST
    failed = jnp.where(~succeeded & spent, jnp.maximum(trial.failed, trial.bound), trial.failed)
    smaller = jnp.maximum(_SHRINK * distance, (failed + distance) / 2)
    found = jnp.isfinite(distance)
    return trial._replace(
        constant=jnp.where(succeeded, trial.constant, jnp.where(spent, initial, grown)),
        bound=jnp.where(found, jnp.minimum(smaller, radius), trial.bound),
        failed=jnp.where(found, failed, trial.failed),
    )


@remembered
def carlini_wagner(
    threat: Threat,
    *,
    steps: int = 9000,
    searches: int = 9,
    step_size: float = 0.01,
    confidence: float = 0.0,
    initial_constant: float = 1e-3,
    estimator: Estimator | None = None,
) -> Iteration:
    """Carlini & Wagner's attacks (arXiv:1608.04644), in L2 and L-inf.

    Adam descends |change|^2 + constant x lack in L2, and sum max(|change| - bound, 0) + constant x
    lack in L-inf, where the lack is max(`confidence` - margin, 0): broken is what has a margin
    above `confidence`. It begins afresh in every round of `steps / searches` steps. Pixels at the
    very bounds, where tanh is flat, need some hundred steps to leave them: rounds must be longer.

    In L2 a round begins at the clean image and ends with a step of the binary search for the
    constant. The authors' rounds take 10,000 steps, or fewer where the loss no longer falls.

    In L-inf a round goes on from where it is. It ends as soon as a broken image is within the
    bound, which becomes 0.9 times the smallest distance so far, and otherwise with a larger
    constant. Unlike the authors' the steps shrink to nothing over a round, and where no constant
    up to 20 is enough, there the search does not end: the bound goes halfway back to the smallest
    distance. At a finite radius no bound is larger than the radius.
    """
    expect(threat, "Carlini & Wagner", *_NORMS)
    whole("steps", steps, 1)
    whole("searches", searches, 1, steps)
    within("step_size", step_size, above=0.0)
    within("confidence", confidence, 0.0)
    within("initial_constant", initial_constant, above=0.0)
    estimate = usable(estimator)
    adam = optax.scale_by_adam()
    length = steps // searches
    middle, half = (threat.high + threat.low) / 2, (threat.high - threat.low) / 2

    def clipped(point: Array) -> Array:
        end = jnp.arctanh(jnp.float32(_END))
        return jnp.clip(point, -end, end)

    def to_point(image: Image) -> Array:
        return clipped(jnp.arctanh(_END * (image - middle) / half))

    def to_image(point: Array) -> Image:
        return jnp.clip(middle + half * jnp.tanh(point), threat.low, threat.high)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Descent:
        clean_key, key = jax.random.split(key)
        lead = margin(mean_logits(estimate, logits_fn, clean_key, image), target)
        point, zero = to_point(image), jnp.int32(0)
        trial = Trial(
            constant=jnp.float32(initial_constant),
            bound=jnp.minimum(jnp.float32(2.0 * half), threat.radius),
            failed=jnp.float32(0.0),
            enough=jnp.float32(jnp.inf),
        )
        return Descent(
            key=key, clean=image, target=target, image=to_image(point), point=point,
            adam=adam.init(point), trial=trial, succeeded=jnp.bool_(False), taken=zero, done=zero,
            nearest=nearer(threat, image, none_yet(image), image, lead > confidence),
        )  # fmt: skip

    def step(logits_fn: LogitsFn, state: Descent) -> Descent:
        def value(key: Key, image: Image) -> tuple[Scalar, Logits]:
            logits = logits_fn(key, image)
            return jnp.maximum(confidence - margin(logits, state.target), 0.0), logits

        # --- look
        key = jax.random.fold_in(state.key, state.done)
        (_, logits), gradient = estimate(value)(key, state.image)
        broken = margin(logits, state.target) > confidence
        nearest = nearer(threat, state.clean, state.nearest, state.image, broken)
        change, trial, taken = state.image - state.clean, state.trial, state.taken + 1

        # --- descend, in tanh space
        if threat.norm is l2:
            pull, size = 2.0 * change, jnp.float32(step_size)
        else:
            # Pixels hover around the bound by a step's length: all are within it at once only as
            # the steps become short.
            pull = jnp.sign(change) * (jnp.abs(change) > trial.bound)
            size = step_size * (1.0 - state.taken / length)
        steepness = half * (1.0 - jnp.tanh(state.point) ** 2)
        descent, moments = adam.update((pull + trial.constant * gradient) * steepness, state.adam)
        point = clipped(state.point - size * descent)
        point = last_finite(point, state.point)

        # --- at the end of a round, plan the next one; the last one's image is the attack's last
        if threat.norm is l2:
            succeeded, over = state.succeeded | broken, taken == length
            planned, start = _next_constant(trial, succeeded), to_point(state.clean)
        else:
            succeeded = broken & (threat.norm.measure(change) <= trial.bound)
            over = succeeded | (taken == length)
            planned = _next_bound(
                trial, succeeded, nearest.distance, threat.radius, initial_constant
            )
            start = point
        over = over & (state.done + 1 < steps)
        fresh = (start, adam.init(start), planned, jnp.bool_(False), jnp.int32(0))
        point, moments, trial, succeeded, taken = jax.tree.map(
            lambda new, old: jnp.where(over, new, old),
            fresh,
            (point, moments, trial, succeeded, taken),
        )
        return state._replace(
            image=to_image(point), point=point, adam=moments, trial=trial, succeeded=succeeded,
            taken=taken, done=state.done + 1, nearest=nearest,
        )  # fmt: skip

    def best(logits_fn: LogitsFn, state: Descent) -> tuple[Image, Scalar]:
        found = within_threat(threat, state.clean, state.nearest, state.image)
        key = jax.random.fold_in(state.key, state.done)
        lead = margin(mean_logits(estimate, logits_fn, key, found), state.target)
        # Pulled into the threat, an image found beyond it may still be misclassified.
        nearest = nearer(threat, state.clean, state.nearest, found, lead > confidence)
        return found, score(threat, nearest, lead)

    return Iteration(
        init, step, best, steps, seen=lambda state: known(threat, state.nearest),
        uses=estimate.uses, draws=estimate.draws, norms=_NORMS, minimum_norm=True,
    )  # fmt: skip
