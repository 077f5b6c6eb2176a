"""Auto-PGD: ascent that finds its own step size (Croce & Hein, arXiv:2003.01690)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.attacks.restarts import restarted, side_by_side
from rain_jax.checks import UsageError, within
from rain_jax.gradients import exact
from rain_jax.losses import cross_entropy, dlr_targeted, margin
from rain_jax.norms import l2, linf, project, random_start
from rain_jax.types import (
    Array,
    Estimator,
    Image,
    Iteration,
    Key,
    Logits,
    LogitsFn,
    Loss,
    Scalar,
    Target,
    Threat,
)

# The paper's constants. A step goes three quarters of its way and a quarter of the one before; of
# the steps in a window, more than three quarters must raise the loss; the windows' lengths are
# shares of all steps: the first, the shortest, and by how much each is shorter than the last.
_WAY, _RISING = 0.75, 0.75
_FIRST, _SHORTEST, _SHORTER = 0.22, 0.06, 0.03


class Adaptive(NamedTuple):
    """Where one image's ascent stands."""

    key: Key  # for the model's randomness, one fold for each evaluation
    clean: Image
    target: Target
    aim: Array  # int32, the class that a targeted loss moves to
    image: Image
    previous: Image
    gradient: Image
    loss: Scalar
    size: Scalar  # of the next step, in the threat's norm
    done: Scalar  # int32, steps
    window: Scalar  # int32, after how many steps the step size is judged
    counted: Scalar  # int32, steps since the last judgement
    rises: Scalar  # int32, how many of those raised the loss
    halved: Scalar  # bool, what the last judgement was
    judged_loss: Scalar  # the largest loss there was then
    top: Image  # the point of the largest loss, its gradient and loss: halving goes back there
    top_gradient: Image
    top_loss: Scalar
    found: Image  # the image of the largest margin, which is the answer
    score: Scalar


AimedLoss = Callable[[Logits, Target, Array], Scalar]  # logits, label, the class aimed at


def adaptive_ascent(
    threat: Threat,
    loss: AimedLoss,
    *,
    steps: int,
    estimator: Estimator | None = None,
    rank: Any = 0,
) -> Iteration:
    """Auto-PGD on `loss(logits, label, aim)`, in L-inf or L2.

    The first step is twice the radius. At the end of each window the step size is halved, and the
    ascent goes back to its best point, where too few steps raised the loss or where an unhalved
    size found nothing better. `aim` is the wrong class of that `rank` on the clean image, 0 for
    the likeliest. The answer has the largest margin met, by the estimator's mean over draws.

    Raises `UsageError` for another norm, or fewer than one step.
    """
    within("steps", steps, 1)
    if threat.norm is not linf and threat.norm is not l2:
        raise UsageError("norm: Auto-PGD expects linf or l2")
    estimate = exact() if estimator is None else estimator
    first, shortest, shorter = (
        max(int(share * steps), 1) for share in (_FIRST, _SHORTEST, _SHORTER)
    )

    def evaluate(
        logits_fn: LogitsFn, key: Key, image: Image, target: Target, aim: Array
    ) -> tuple[tuple[Scalar, Scalar], Image]:
        def value(key: Key, image: Image) -> tuple[Scalar, Scalar]:
            logits = logits_fn(key, image)
            return loss(logits, target, aim), margin(logits, target)

        return estimate(value)(key, image)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Adaptive:
        start_key, aim_key, key = jax.random.split(key, 3)
        logits = logits_fn(aim_key, image)
        wrong = jnp.where(jnp.arange(logits.shape[-1]) == target, -jnp.inf, logits)
        aim = jnp.argsort(-wrong)[rank].astype(jnp.int32)
        begin = random_start(threat, start_key, image)
        (value, score), gradient = evaluate(
            logits_fn, jax.random.fold_in(key, 0), begin, target, aim
        )
        zero = jnp.int32(0)
        return Adaptive(
            key=key, clean=image, target=target, aim=aim,
            image=begin, previous=begin, gradient=gradient, loss=value,
            size=jnp.float32(2.0) * threat.radius, done=zero,
            window=jnp.int32(first), counted=zero, rises=zero,
            halved=jnp.bool_(True), judged_loss=value,
            top=begin, top_gradient=gradient, top_loss=value,
            found=begin, score=score,
        )  # fmt: skip

    def step(logits_fn: LogitsFn, state: Adaptive) -> Adaptive:
        # --- move: a steepest step, then part of the way there and part of the last move again
        climbed = state.image + state.size * threat.norm.steepest(state.gradient)
        ahead = project(threat, state.clean, climbed)
        way = jnp.where(state.done == 0, 1.0, _WAY)
        drift = state.image - state.previous
        moved = state.image + way * (ahead - state.image) + (1.0 - way) * drift
        image = project(threat, state.clean, moved)
        key = jax.random.fold_in(state.key, state.done + 1)
        (value, score), gradient = evaluate(logits_fn, key, image, state.target, state.aim)

        # --- remember: the most broken image, and the point of the largest loss
        broken, higher = score > state.score, value > state.top_loss
        top = jnp.where(higher, image, state.top)
        top_gradient = jnp.where(higher, gradient, state.top_gradient)
        top_loss = jnp.where(higher, value, state.top_loss)

        # --- judge the step size, at the end of a window
        counted = state.counted + 1
        rises = state.rises + (value > state.loss)
        due = counted == state.window
        slow = rises <= _RISING * counted
        stuck = ~state.halved & (state.judged_loss >= top_loss)
        halve = due & (slow | stuck)
        return state._replace(
            image=jnp.where(halve, top, image),
            previous=state.image,
            gradient=jnp.where(halve, top_gradient, gradient),
            loss=value,
            size=jnp.where(halve, state.size / 2, state.size),
            done=state.done + 1,
            window=jnp.where(due, jnp.maximum(state.window - shorter, shortest), state.window),
            counted=jnp.where(due, 0, counted),
            rises=jnp.where(due, 0, rises),
            halved=jnp.where(due, halve, state.halved),
            judged_loss=jnp.where(due, top_loss, state.judged_loss),
            top=top,
            top_gradient=top_gradient,
            top_loss=top_loss,
            found=jnp.where(broken, image, state.found),
            score=jnp.where(broken, score, state.score),
        )

    def best(logits_fn: LogitsFn, state: Adaptive) -> tuple[Image, Scalar]:
        return state.found, state.score

    return Iteration(init, step, best, steps)


def apgd(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
) -> Iteration:
    """Auto-PGD, untargeted: APGD-CE, or APGD-DLR with `loss=dlr` (arXiv:2003.01690). L-inf, L2."""

    def unaimed(logits: Logits, label: Target, aim: Array) -> Scalar:
        return loss(logits, label)

    attack = adaptive_ascent(threat, unaimed, steps=steps, estimator=estimator)
    return restarted(attack, restarts)


def apgd_t(
    threat: Threat,
    *,
    steps: int = 100,
    targets: int = 9,
    estimator: Estimator | None = None,
) -> Iteration:
    """APGD-T: Auto-PGD on the targeted DLR loss, towards each of the likeliest wrong classes.

    `targets` of them side by side, or all the others where there are fewer (arXiv:2003.01690).
    With two classes the loss is the difference of the two logits. L-inf and L2.
    """
    within("targets", targets, 1)

    def towards(rank: Any) -> Iteration:
        return adaptive_ascent(threat, dlr_targeted, steps=steps, estimator=estimator, rank=rank)

    towards(0)  # a mistake is met now, not when the attack begins
    return side_by_side(towards, lambda classes: min(targets, classes - 1), steps)
