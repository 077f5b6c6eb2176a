"""Projected gradient ascent: FGSM, PGD (BIM), MI-FGSM and whatever optax can climb with."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rain_jax.attacks.restarts import restarted
from rain_jax.checks import one_of, pixel_distance, within
from rain_jax.gradients import exact
from rain_jax.losses import cross_entropy, margin
from rain_jax.norms import linf, project, random_start, steepest
from rain_jax.types import (
    Estimator,
    Image,
    Iteration,
    Key,
    LogitsFn,
    Loss,
    PyTree,
    Scalar,
    Target,
    Threat,
)


class Ascent(NamedTuple):
    """Where one image's ascent stands."""

    key: Key  # for the model's randomness, one fold for each step
    clean: Image
    target: Target
    image: Image
    climb: PyTree  # the optimiser's state
    done: Scalar  # int32, steps
    found: Image  # the best of the images judged so far, and its margin
    score: Scalar


def ascent(
    threat: Threat,
    climb: optax.GradientTransformation,
    *,
    steps: int,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
    start: Literal["uniform", "clean"] = "uniform",
    keep: Literal["best", "last"] = "best",
) -> Iteration:
    """Climbs `loss` by `climb`, back into the threat after each step (Madry, arXiv:1706.06083).

    `climb` turns gradients into steps *upwards*: `optax.chain(steepest(linf), optax.scale(0.01))`.
    `keep="best"` returns the image of the largest margin met, by the estimator's own mean over
    draws for random models; `keep="last"` the last one, as adversarial training wants it, and
    costs one forward pass less.
    """
    within("steps", steps, 1)
    one_of("start", start, ("uniform", "clean"))
    one_of("keep", keep, ("best", "last"))
    estimate = exact() if estimator is None else estimator

    def judged(logits_fn: LogitsFn, target: Target) -> Any:
        def value(key: Key, image: Image) -> tuple[Scalar, Scalar]:
            logits = logits_fn(key, image)
            return loss(logits, target), margin(logits, target)

        return estimate(value)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Ascent:
        # A random model and a random start must not share their draws.
        start_key, model_key = jax.random.split(key)
        first = image if start == "clean" else random_start(threat, start_key, image)
        return Ascent(
            model_key, image, target, first, climb.init(image),
            jnp.int32(0), first, jnp.float32(-jnp.inf),
        )  # fmt: skip

    def judge(state: Ascent, score: Scalar) -> Ascent:
        better = score > state.score
        return state._replace(
            found=jnp.where(better, state.image, state.found),
            score=jnp.where(better, score, state.score),
        )

    def step(logits_fn: LogitsFn, state: Ascent) -> Ascent:
        key = jax.random.fold_in(state.key, state.done)
        (_, score), gradient = judged(logits_fn, state.target)(key, state.image)
        if keep == "best":
            state = judge(state, score)
        change, climbed = climb.update(gradient, state.climb, state.image)
        moved = project(threat, state.clean, state.image + change)
        return state._replace(image=moved, climb=climbed, done=state.done + 1)

    def best(logits_fn: LogitsFn, state: Ascent) -> tuple[Image, Scalar]:
        key = jax.random.fold_in(state.key, state.done)
        (_, score), _ = judged(logits_fn, state.target)(key, state.image)
        if keep == "last":
            return state.image, score
        state = judge(state, score)
        return state.found, state.score

    return Iteration(init, step, best, steps)


def _step(threat: Threat, size: Any) -> Any:
    """A step longer than all pixel values is a slip in L-inf; other norms add up over pixels."""
    if threat.norm is linf:
        pixel_distance("step_size", size)
    return within("step_size", size, above=0.0)


def pgd(
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
    start: Literal["uniform", "clean"] = "uniform",
    keep: Literal["best", "last"] = "best",
) -> Iteration:
    """Projected gradient descent by steepest steps (Madry et al., arXiv:1706.06083).

    `step_size` is in pixel values of [0, 1], measured in the threat's norm; by default
    2.5 x radius / steps, which lets the attack cross the ball. `start="clean"` makes it BIM.
    With `restarts` the image of the largest margin over all runs is returned.
    """
    within("steps", steps, 1)
    size = 2.5 * threat.radius / steps if step_size is None else _step(threat, step_size)
    climb = optax.chain(steepest(threat.norm), optax.scale(size))
    attack = ascent(
        threat, climb, steps=steps, loss=loss, estimator=estimator, start=start, keep=keep
    )
    return restarted(attack, restarts)


def fgsm(
    threat: Threat,
    *,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
    start: Literal["uniform", "clean"] = "clean",
    step_size: float | None = None,
) -> Iteration:
    """One steepest step over the whole radius (Goodfellow et al., arXiv:1412.6572).

    `start="uniform"` with `step_size=1.25 * radius` is Fast-AT's RS-FGSM (arXiv:2001.03994).
    """
    size = threat.radius if step_size is None else _step(threat, step_size)
    climb = optax.chain(steepest(threat.norm), optax.scale(size))
    return ascent(threat, climb, steps=1, loss=loss, estimator=estimator, start=start, keep="last")


def mi_fgsm(
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
    start: Literal["uniform", "clean"] = "clean",
) -> Iteration:
    """PGD with momentum over gradients of unit L1 norm (Dong et al., arXiv:1710.06081)."""
    within("steps", steps, 1)
    within("decay", decay, 0.0)
    size = threat.radius / steps if step_size is None else _step(threat, step_size)
    unit = optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: g / (jnp.sum(jnp.abs(g)) + 1e-12), updates)
    )
    climb = optax.chain(unit, optax.trace(decay), steepest(threat.norm), optax.scale(size))
    attack = ascent(threat, climb, steps=steps, loss=loss, estimator=estimator, start=start)
    return restarted(attack, restarts)
