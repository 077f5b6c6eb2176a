"""Projected gradient ascent: FGSM, PGD (BIM), MI-FGSM and whatever optax can climb with."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rain_jax.attacks.restarts import restarted, side_by_side
from rain_jax.checks import UsageError, one_of, pixel_distance, whole, within
from rain_jax.gradients import last_finite, usable
from rain_jax.losses import cross_entropy, kl, lead, margin, targeted
from rain_jax.norms import expect, l1, l2, linf, project, steepest
from rain_jax.remembered import remembered
from rain_jax.types import (
    Array,
    Estimator,
    Image,
    Iteration,
    Key,
    Logits,
    LogitsFn,
    Loss,
    PyTree,
    Scalar,
    Target,
    Threat,
)

Aim = Callable[[Key, Logits, Target], Target]
"""What a loss compares with, given the logits of the clean image and its label."""

Start = Literal["uniform", "sign", "normal", "clean"]
Climber = Literal["steepest", "adam"]
Goal = Literal["untargeted", "likeliest", "least_likely", "random"]

_NORMS = linf, l2, l1
# The spread of the normal start, TRADES' own (arXiv:1901.08573).
_NEARBY = 1e-3
# Adam's guard against division by zero. At its usual 1e-8 the gradients of a confident model, which
# are smaller still, would hardly move the image.
_ADAM_GUARD = 1e-12


def wrong_classes(logits: Logits, label: Target) -> Array:
    """The classes other than `label`, [K - 1] int32, the likeliest first."""
    others = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return jnp.argsort(-others)[:-1].astype(jnp.int32)


def rival(rank: Any) -> Aim:
    """The label, and the wrong class of that rank on the clean image, 0 for the likeliest."""
    return lambda key, logits, label: (label, wrong_classes(logits, label)[rank])


_GOALS: dict[str, Aim] = {
    "likeliest": lambda key, logits, label: wrong_classes(logits, label)[0],
    "least_likely": lambda key, logits, label: wrong_classes(logits, label)[-1],
    "random": lambda key, logits, label: jax.random.choice(key, wrong_classes(logits, label)),
}


def comparison(
    loss: Loss, aim: Aim | None, estimate: Estimator
) -> Callable[[Key, LogitsFn, Image, Target], Target]:
    """What `loss` compares with throughout: what `aim` says, or else the label.

    KL compares with the clean image's own logits. Those of a random model are means over the
    estimator's draws.
    """
    if aim is None and loss is kl:
        aim = lambda key, logits, label: logits
    if aim is None:
        return lambda key, logits_fn, image, label: label

    def against(key: Key, logits_fn: LogitsFn, image: Image, label: Target) -> Target:
        model_key, aim_key = jax.random.split(key)
        silent = estimate(lambda key, image: (jnp.float32(0.0), logits_fn(key, image)))
        (_, logits), _ = silent(model_key, image)
        return aim(aim_key, logits, label)

    return against


class Ascent(NamedTuple):
    """Where one image's ascent stands."""

    key: Key  # for the model's randomness, one fold for each step
    clean: Image
    target: Target  # the label, which the margin is of
    against: Target  # what the loss compares with
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
    aim: Aim | None = None,
    estimator: Estimator | None = None,
    start: Start = "uniform",
    start_scale: Any = 1.0,
    keep: Literal["best", "last"] = "best",
) -> Iteration:
    """Climbs `loss` by `climb`, back into the threat after each step (Madry, arXiv:1706.06083).

    `climb` turns gradients into steps *upwards*: `optax.chain(steepest(linf), optax.scale(0.01))`.
    `aim` says what the loss compares with where that is not the label; `loss=kl` compares with the
    prediction on the clean image, as TRADES does. `start="normal"` is a thousandth of normal noise,
    "sign" a random corner of the ball in L-inf; `start_scale` stretches what is drawn.
    `keep="best"` returns the image of the largest margin met, for random models that of the mean
    logits over the estimator's draws, as the judge has it; `keep="last"` the last one, as
    adversarial training wants it, and costs one forward pass less.
    """
    whole("steps", steps, 1)
    one_of("start", start, ("uniform", "sign", "normal", "clean"))
    within("start_scale", start_scale, above=0.0)
    one_of("keep", keep, ("best", "last"))
    if start == "sign":
        expect(threat, "start='sign'", linf)
    if loss is kl and start == "clean":
        raise UsageError("start='clean': expected uniform or normal: KL has no gradient there")
    estimate = usable(estimator)
    compared = comparison(loss, aim, estimate)

    def judged(logits_fn: LogitsFn, against: Target) -> Any:
        def value(key: Key, image: Image) -> tuple[Scalar, Logits]:
            logits = logits_fn(key, image)
            return loss(logits, against), logits

        return estimate(value)

    def first(key: Key, image: Image) -> Image:
        if start == "clean":
            return image
        if start == "normal":
            change = _NEARBY * jax.random.normal(key, image.shape)
        elif start == "sign":
            change = threat.radius * jax.random.rademacher(key, image.shape, image.dtype)
        else:
            change = threat.norm.sample(key, image.shape, threat.radius)
        return project(threat, image, image + start_scale * change)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Ascent:
        # A random model, a random start and a random aim must not share their draws.
        start_key, model_key, aim_key = jax.random.split(key, 3)
        begin = first(start_key, image)
        return Ascent(
            model_key, image, target, compared(aim_key, logits_fn, image, target), begin,
            climb.init(image), jnp.int32(0), begin, jnp.float32(-jnp.inf),
        )  # fmt: skip

    def judge(state: Ascent, logits: Logits) -> Ascent:
        score = margin(logits, state.target)
        better = score > state.score
        return state._replace(
            found=jnp.where(better, state.image, state.found),
            score=jnp.where(better, score, state.score),
        )

    def step(logits_fn: LogitsFn, state: Ascent) -> Ascent:
        key = jax.random.fold_in(state.key, state.done)
        (_, logits), gradient = judged(logits_fn, state.against)(key, state.image)
        if keep == "best":
            state = judge(state, logits)
        change, climbed = climb.update(gradient, state.climb, state.image)
        moved = project(threat, state.clean, state.image + change)
        moved = last_finite(moved, state.image)
        return state._replace(image=moved, climb=climbed, done=state.done + 1)

    def best(logits_fn: LogitsFn, state: Ascent) -> tuple[Image, Scalar]:
        key = jax.random.fold_in(state.key, state.done)
        (_, logits), _ = judged(logits_fn, state.against)(key, state.image)
        if keep == "last":
            return state.image, margin(logits, state.target)
        state = judge(state, logits)
        return state.found, state.score

    def seen(state: Ascent) -> tuple[Image, Scalar]:
        return state.found, state.score

    return Iteration(
        init, step, best, steps,
        seen=seen if keep == "best" else None, once=estimator is None,
        uses=estimate.uses, draws=estimate.draws, norms=_NORMS,
    )  # fmt: skip


def _step(threat: Threat, size: Any) -> Any:
    """A step longer than all pixel values is a slip in L-inf; other norms add up over pixels."""
    if threat.norm is linf:
        pixel_distance("step_size", size)
    return within("step_size", size, above=0.0)


def steepest_step(threat: Threat, size: Any) -> optax.GradientTransformation:
    """The step of `size` that climbs fastest; its `update` needs the image as `params`.

    In L1 one pixel alone would take it all, and lose what its bound cuts off. So the steepest
    pixels go to their bounds, one after the other, until the size is used up.
    """
    if threat.norm is not l1:
        return optax.chain(steepest(threat.norm), optax.scale(size))

    def fill(gradient: Array, image: Image) -> Array:
        room = jnp.where(gradient > 0, threat.high - image, image - threat.low).ravel()
        order = jnp.argsort(-jnp.abs(gradient), axis=None)
        spent = jnp.cumsum(room[order]) - room[order]
        moves = jnp.zeros_like(room).at[order].set(jnp.clip(size - spent, 0.0, room[order]))
        return jnp.sign(gradient) * moves.reshape(gradient.shape)

    return optax.stateless(lambda updates, image: jax.tree.map(fill, updates, image))


def _climb(
    threat: Threat, steps: int, step_size: float | None, climber: Climber
) -> optax.GradientTransformation:
    """Steps of one size; by default they add up to two and a half radii and can cross the ball."""
    whole("steps", steps, 1)
    one_of("climber", climber, ("steepest", "adam"))
    size = 2.5 * threat.radius / steps if step_size is None else _step(threat, step_size)
    if climber == "steepest":
        return steepest_step(threat, size)
    # Adam rescales each pixel by itself. Only a ball whose sides lie along the pixels lets such an
    # ascent come to rest where the loss is largest; on a plane in L2 it would end well short.
    expect(threat, "climber='adam'", linf)
    return optax.chain(optax.scale_by_adam(eps=_ADAM_GUARD), optax.scale(size))


@remembered
def pgd(
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    goal: Goal = "untargeted",
    climber: Climber = "steepest",
    estimator: Estimator | None = None,
    start: Start = "uniform",
    start_scale: float = 1.0,
    keep: Literal["best", "last"] = "best",
) -> Iteration:
    """Projected gradient descent by steepest steps (Madry et al., arXiv:1706.06083).

    `step_size` is in pixel values of [0, 1], measured in the threat's norm; by default
    2.5 x radius / steps, which lets the attack cross the ball. `start="clean"` makes it BIM;
    `start="sign"`, in L-inf, begins in a random corner of the ball, as FGSM-PGI does
    (arXiv:2207.08859), or `start_scale` of the way to it. With `restarts` the image of the largest
    margin over all runs is returned.

    `loss=kl` moves away from the prediction on the clean image, whatever its label (TRADES,
    arXiv:1901.08573). With a `goal` the loss descends towards one wrong class, chosen by the clean
    image's logits or at random; the answer is still the image of the largest margin.
    `climber="adam"` steps by Adam (arXiv:1412.6980), no pixel further than about `step_size` in one
    step, in L-inf only.
    """
    one_of("goal", goal, ("untargeted", *_GOALS))
    attack = ascent(
        threat,
        _climb(threat, steps, step_size, climber),
        steps=steps,
        loss=loss if goal == "untargeted" else targeted(loss),
        aim=_GOALS.get(goal),
        estimator=estimator,
        start=start,
        start_scale=start_scale,
        keep=keep,
    )
    return restarted(attack, restarts)


@remembered
def multi_targeted(
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    targets: int = 9,
    restarts: int = 1,
    climber: Climber = "steepest",
    estimator: Estimator | None = None,
) -> Iteration:
    """MultiTargeted PGD (Gowal et al., arXiv:1910.09338): one ascent for each likely wrong class.

    Each climbs the difference between that class's logit and the label's; on a linear model the one
    that gets furthest is at the optimum. The `targets` likeliest wrong classes of the clean image,
    or all of them where there are fewer, go side by side, and so do `restarts` of each; the answer
    has the largest margin. `step_size` and `climber` are those of `pgd`.
    """
    whole("targets", targets, 1)
    climb = _climb(threat, steps, step_size, climber)

    def towards(rank: Any) -> Iteration:
        return ascent(
            threat,
            climb,
            steps=steps,
            loss=lambda logits, pair: lead(logits, *pair),
            aim=rival(rank),
            estimator=estimator,
        )

    attack = side_by_side(towards, lambda classes: min(targets, classes - 1), steps)
    return restarted(attack, restarts)


@remembered
def fgsm(
    threat: Threat,
    *,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
    start: Start = "clean",
    step_size: float | None = None,
) -> Iteration:
    """One steepest step over the whole radius (Goodfellow et al., arXiv:1412.6572).

    `start="uniform"` with `step_size=1.25 * radius` is Fast-AT's RS-FGSM (arXiv:2001.03994).
    """
    size = threat.radius if step_size is None else _step(threat, step_size)
    climb = steepest_step(threat, size)
    return ascent(threat, climb, steps=1, loss=loss, estimator=estimator, start=start, keep="last")


@remembered
def mi_fgsm(
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
    start: Start = "clean",
) -> Iteration:
    """PGD with momentum over gradients of unit L1 norm (Dong et al., arXiv:1710.06081)."""
    whole("steps", steps, 1)
    within("decay", decay, 0.0)
    size = threat.radius / steps if step_size is None else _step(threat, step_size)
    unit = optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: g / (jnp.sum(jnp.abs(g)) + 1e-12), updates)
    )
    climb = optax.chain(unit, optax.trace(decay), steepest_step(threat, size))
    attack = ascent(threat, climb, steps=steps, loss=loss, estimator=estimator, start=start)
    return restarted(attack, restarts)
