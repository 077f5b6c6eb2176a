"""Auto-PGD: ascent that finds its own step size (Croce & Hein, arXiv:2003.01690, 2103.01208)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.attacks.pgd import Aim, comparison, rival
from rain_jax.attacks.restarts import restarted, side_by_side
from rain_jax.checks import whole
from rain_jax.gradients import last_finite, usable
from rain_jax.losses import cross_entropy, dlr_targeted, margin
from rain_jax.norms import expect, l1, l2, linf, project, random_start
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

_NORMS = linf, l2, l1

# The first paper's constants, for L-inf and L2. A step goes three quarters of its way and a quarter
# of the one before; of the steps in a window, more than three quarters must raise the loss; the
# windows' lengths are shares of all steps: the first, the shortest, and by how much each is shorter
# than the last.
_WAY, _RISING = 0.75, 0.75
_FIRST, _SHORTEST, _SHORTER = 0.22, 0.06, 0.03

# The second paper's, for L1. Radii in units of the threat's, and tenths of all steps spent in each;
# a window's share of those steps; a step moves this much fewer pixels than the best point has
# moved; the best point grows sparser as long as it has moved less than this share of the pixels
# that it had; otherwise steps shrink by this much, to a tenth at least.
_RADII, _TENTHS = (3.0, 2.0, 1.0), (3, 3, 4)
_WINDOW = 0.04
_FEWER, _SPARSER = 1.5, 0.95
_SHRINK, _SMALLEST = 1.5, 0.1


class Point(NamedTuple):
    """An image that the model has seen, with the loss there and its gradient."""

    image: Image
    gradient: Image
    loss: Scalar


class Adaptive(NamedTuple):
    """Where one image's ascent stands."""

    key: Key  # for the model's randomness, one fold for each evaluation
    clean: Image
    target: Target  # the label, which the margin is of
    against: Target  # what the loss compares with
    image: Image
    gradient: Image
    loss: Scalar  # at the last point evaluated, which halving may have left since
    pace: PyTree  # what the norm's rule keeps of its own
    done: Scalar  # int32, evaluations after the first
    top: Point  # the point of the largest loss: the ascent goes back there
    found: Image  # the image of the largest margin within the threat, which is the answer
    score: Scalar


class Rule(NamedTuple):
    """How an ascent starts, moves and adapts its steps: all in which the norms differ."""

    phases: tuple[tuple[float, int], ...]  # a radius in units of the threat's, and steps in it
    start: Callable[[Threat, Key, Image], Image]
    begin: Callable[[Threat, Image, Point, Array], PyTree]  # threat, clean, point, phase -> pace
    move: Callable[[Threat, Adaptive], Image]  # where to go from here, before projection
    # threat, state, loss there, top since -> pace, whether to go back to the top
    judge: Callable[[Threat, Adaptive, Scalar, Point], tuple[PyTree, Array]]


def _choose(condition: Array, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(partial(jnp.where, condition), one, other)


class Halving(NamedTuple):
    """The pace in L-inf and L2."""

    size: Scalar  # of the next step, in the threat's norm
    previous: Image
    way: Scalar  # how much of it is gone
    window: Scalar  # int32, after how many steps the step size is judged
    counted: Scalar  # int32, steps since the last judgement
    rises: Scalar  # int32, how many of those raised the loss
    halved: Scalar  # bool, what the last judgement was
    judged_loss: Scalar  # the largest loss there was then


def _halving(steps: int) -> Rule:
    """Steps are halved where too few of them raise the loss, or where whole ones found no more."""
    first, shortest, shorter = (
        max(int(share * steps), 1) for share in (_FIRST, _SHORTEST, _SHORTER)
    )

    def begin(threat: Threat, clean: Image, here: Point, phase: Array) -> Halving:
        zero = jnp.int32(0)
        return Halving(
            size=2.0 * threat.radius, previous=here.image, way=jnp.float32(1.0),
            window=jnp.int32(first), counted=zero, rises=zero,
            halved=jnp.bool_(True), judged_loss=here.loss,
        )  # fmt: skip

    def move(threat: Threat, state: Adaptive) -> Image:
        pace = state.pace
        climbed = state.image + pace.size * threat.norm.steepest(state.gradient)
        ahead = project(threat, state.clean, climbed)
        drift = state.image - pace.previous
        return state.image + pace.way * (ahead - state.image) + (1.0 - pace.way) * drift

    def judge(threat: Threat, state: Adaptive, loss: Scalar, top: Point) -> tuple[Halving, Array]:
        pace = state.pace
        counted = pace.counted + 1
        rises = pace.rises + (loss > state.loss)
        due = counted == pace.window
        slow = rises <= _RISING * counted
        stuck = ~pace.halved & (pace.judged_loss >= top.loss)
        halve = due & (slow | stuck)
        after = Halving(
            size=jnp.where(halve, pace.size / 2, pace.size),
            previous=state.image,
            way=jnp.float32(_WAY),
            window=jnp.where(due, jnp.maximum(pace.window - shorter, shortest), pace.window),
            counted=jnp.where(due, 0, counted),
            rises=jnp.where(due, 0, rises),
            halved=jnp.where(due, halve, pace.halved),
            judged_loss=jnp.where(due, top.loss, pace.judged_loss),
        )
        return after, halve

    return Rule(((1.0, steps),), random_start, begin, move, judge)


class Thinning(NamedTuple):
    """The pace in L1."""

    size: Scalar  # of the next step, in L1
    moved: Scalar  # int32, pixels that the best point differed in when last judged
    window: Scalar  # int32, after how many steps that is
    counted: Scalar  # int32, steps since then


def _sparse(threat: Threat, image: Image, gradient: Image, count: Scalar) -> Image:
    """The step of size 1 in L1 that moves the `count` steepest pixels, each by as much.

    Unlike the paper's it passes over those at the bound that they would move to. In few dimensions
    they may be all that it picks, and then the ascent stands still.
    """
    ahead = jnp.where(gradient > 0, threat.high - image, image - threat.low) > 0
    steepness = jnp.where(ahead, jnp.abs(gradient), 0.0)
    least = jnp.sort(steepness, axis=None)[-jnp.maximum(count, 1)]
    sign = jnp.where(ahead & (steepness >= least), jnp.sign(gradient), 0.0)
    return sign / jnp.maximum(jnp.sum(jnp.abs(sign)), 1.0)


def _thinning(steps: int) -> Rule:
    """Steps move fewer pixels as the best point grows sparser, and shrink when it no longer does.

    The radius comes down in three phases, each from the best point of the one before.
    """
    early = [tenth * steps // 10 for tenth in _TENTHS[:-1]]
    phases = tuple(zip(_RADII, [*early, steps - sum(early)], strict=True))
    windows = [max(int(_WINDOW * length), 1) for _, length in phases]

    def start(threat: Threat, key: Key, image: Image) -> Image:
        return project(threat, image, image + jax.random.normal(key, image.shape))

    def moved(clean: Image, image: Image) -> Scalar:
        return jnp.sum(image != clean, dtype=jnp.int32)

    def begin(threat: Threat, clean: Image, here: Point, phase: Array) -> Thinning:
        window = jnp.array(windows, jnp.int32)[phase]
        return Thinning(threat.radius, moved(clean, here.image), window, jnp.int32(0))

    def move(threat: Threat, state: Adaptive) -> Image:
        count = jnp.round(state.pace.moved / _FEWER).astype(jnp.int32)
        step = _sparse(threat, state.image, state.gradient, count)
        return state.image + state.pace.size * step

    def judge(threat: Threat, state: Adaptive, loss: Scalar, top: Point) -> tuple[Thinning, Array]:
        pace = state.pace
        counted = pace.counted + 1
        due = counted == pace.window
        now = moved(state.clean, top.image)
        sparser = now < _SPARSER * pace.moved
        smaller = jnp.maximum(pace.size / _SHRINK, _SMALLEST * threat.radius)
        size = jnp.where(sparser, threat.radius, smaller)
        judged = pace._replace(size=size, moved=now, counted=jnp.int32(0))
        return _choose(due, judged, pace._replace(counted=counted)), due & sparser

    return Rule(phases, start, begin, move, judge)


def adaptive_ascent(
    threat: Threat,
    loss: Loss,
    *,
    steps: int,
    aim: Aim | None = None,
    estimator: Estimator | None = None,
) -> Iteration:
    """Auto-PGD on `loss`, which compares with the label or with what `aim` says.

    In L-inf and L2 the first step is twice the radius. At the end of each window the step size is
    halved, and the ascent goes back to its best point, where too few steps raised the loss or where
    an unhalved size found nothing better (arXiv:2003.01690).

    In L1 a step is the radius, shared by the steepest pixels: two thirds as many as the best point
    has moved. Where that has become sparser by the end of a window the ascent goes back to it with
    full steps; otherwise steps shrink. 30 % of the steps go in three times the radius, 30 % in
    twice, and the rest in the threat itself, as AutoAttack does it (arXiv:2103.01208); each phase
    begins with an evaluation, so the iteration has two steps more.

    The answer has the largest margin met in the threat, that of the mean logits over the
    estimator's draws.

    Raises `UsageError` for another norm, or fewer than one step.
    """
    whole("steps", steps, 1)
    expect(threat, "Auto-PGD", *_NORMS)
    estimate = usable(estimator)
    compared = comparison(loss, aim, estimate)
    rule = _thinning(steps) if threat.norm is l1 else _halving(steps)
    last = len(rule.phases) - 1
    # In evaluations: a phase evaluates where it begins and after each of its steps.
    lengths = [length + 1 for _, length in rule.phases]
    begins = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    radii = np.array([radius for radius, _ in rule.phases], np.float32)

    def within_phase(phase: Array) -> Threat:
        return threat._replace(radius=jnp.asarray(radii)[phase] * threat.radius)

    def evaluate(
        logits_fn: LogitsFn, key: Key, image: Image, target: Target, against: Target
    ) -> tuple[Point, Scalar]:
        def value(key: Key, image: Image) -> tuple[Scalar, Logits]:
            logits = logits_fn(key, image)
            return loss(logits, against), logits

        # Judged as the judge does it, by the margin of the mean logits over the draws.
        (climbed, logits), gradient = estimate(value)(key, image)
        return Point(image, gradient, climbed), margin(logits, target)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Adaptive:
        start_key, aim_key, key = jax.random.split(key, 3)
        against = compared(aim_key, logits_fn, image, target)
        phase = jnp.int32(0)
        wide = within_phase(phase)
        here, score = evaluate(
            logits_fn, jax.random.fold_in(key, 0), rule.start(wide, start_key, image),
            target, against,
        )  # fmt: skip
        inside = phase == last
        return Adaptive(
            key=key, clean=image, target=target, against=against,
            image=here.image, gradient=here.gradient, loss=here.loss,
            pace=rule.begin(wide, image, here, phase), done=jnp.int32(0), top=here,
            found=jnp.where(inside, here.image, image),
            score=jnp.where(inside, score, -jnp.inf),
        )  # fmt: skip

    def step(logits_fn: LogitsFn, state: Adaptive) -> Adaptive:
        number = state.done + 1
        phase = jnp.sum(number >= begins) - 1
        fresh = jnp.any(number == begins)
        wide = within_phase(phase)

        # --- move, or begin the next phase at the best point so far
        aims = jnp.where(fresh, state.top.image, rule.move(wide, state))
        image = last_finite(project(wide, state.clean, aims), state.image)
        key = jax.random.fold_in(state.key, number)
        here, score = evaluate(logits_fn, key, image, state.target, state.against)

        # --- remember the point of the largest loss, and the most broken image
        top = _choose(fresh | (here.loss > state.top.loss), here, state.top)
        broken = (phase == last) & (score > state.score)

        # --- judge the steps
        judged, back = rule.judge(wide, state, here.loss, top)
        pace = _choose(fresh, rule.begin(wide, state.clean, here, phase), judged)
        on = _choose(back & ~fresh, top, here)
        return state._replace(
            image=on.image,
            gradient=on.gradient,
            loss=here.loss,
            pace=pace,
            done=number,
            top=top,
            found=jnp.where(broken, here.image, state.found),
            score=jnp.where(broken, score, state.score),
        )

    def best(logits_fn: LogitsFn, state: Adaptive) -> tuple[Image, Scalar]:
        return state.found, state.score

    return Iteration(
        init, step, best, steps + last,
        uses=estimate.uses, draws=estimate.draws, norms=_NORMS,
    )  # fmt: skip


@remembered
def apgd(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    estimator: Estimator | None = None,
) -> Iteration:
    """Auto-PGD, untargeted: APGD-CE, or APGD-DLR with `loss=dlr` (arXiv:2003.01690, 2103.01208).

    In L1 the radius comes down over the steps; see `adaptive_ascent`.
    """
    attack = adaptive_ascent(threat, loss, steps=steps, estimator=estimator)
    return restarted(attack, restarts)


@remembered
def apgd_t(
    threat: Threat,
    *,
    steps: int = 100,
    targets: int = 9,
    estimator: Estimator | None = None,
) -> Iteration:
    """APGD-T: Auto-PGD on the targeted DLR loss, towards each of the likeliest wrong classes.

    `targets` of them side by side, or all the others where there are fewer (arXiv:2003.01690).
    With two classes the loss is the difference of the two logits. AutoAttack takes 5 in L1.
    """
    whole("targets", targets, 1)

    def towards(rank: Any) -> Iteration:
        return adaptive_ascent(
            threat,
            lambda logits, pair: dlr_targeted(logits, *pair),
            steps=steps,
            aim=rival(rank),
            estimator=estimator,
        )

    # Made once here, too, so that a mistake is met now and not when the attack begins.
    length = towards(0).steps
    return side_by_side(towards, lambda classes: min(targets, classes - 1), length)
