"""Universal perturbations: one change to all images that leads most of them astray.

They are made from a set of images, and so are no `Attack`s as the other files' are: `uap` and `tup`
give a `Universal`, and `apply` makes an attack of the perturbation that it found, to be judged like
any other, on images that it was not made from.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.attacks.deepfool import mean_logits, nearest_boundary, wrong_classes
from rain_jax.checks import one_of, whole, within
from rain_jax.gradients import usable
from rain_jax.losses import cross_entropy, margin, targeted
from rain_jax.norms import expect, l2, linf
from rain_jax.types import (
    Array,
    Attack,
    Estimator,
    Image,
    Key,
    Logits,
    LogitsFn,
    Loss,
    Scalar,
    Target,
    Threat,
)

__all__ = ["Found", "Universal", "apply", "boundary_first", "tup", "uap"]


class Found(NamedTuple):
    """A universal perturbation, and what it does to the images it was made from."""

    perturbation: Array  # [H, W, C], within the radius; only images that have it added are clipped
    rate: Scalar  # the share of the images that it hits
    converged: Scalar  # bool, whether that is the rate asked for or more
    passes: Scalar  # int32, how often the search went through the images


Universal = Callable[[Key, LogitsFn, Array, Array], Found]
"""`(key, logits_fn, images, target) -> Found`: images [N, H, W, C]; labels [N], or one class []."""

# An image whose cross-entropy is beyond this is left alone by "sgd": the few that are far over the
# boundary would have all of the gradient (beta of Shafahi et al., arXiv:1811.11304).
_LOSS_CAP = 9.0
# DeepFool looks at the boundaries between this many classes, the label's among them; the number is
# that of the code which came with arXiv:1610.08401.
_CANDIDATES = 10
# Steps of "sgd" and "fgsm" as a share of the radius: our choice.
# One step of "fgsm" must cross a boundary: its authors' 0.06 is short for some hundred images.
_STEP = 0.2
# How many images go through the model at once where only its logits are wanted.
_TOGETHER = 128


class Aim(NamedTuple):
    """What is wanted of an image's logits, given its label or the target."""

    lead: Loss  # positive where the image is hit
    loss: Loss  # what "sgd" and "fgsm" climb
    # DeepFool's boundaries: the class to be lowered [], and those that may take its place [M]
    classes: Callable[[Logits, Array], tuple[Array, Array]]


def _capped(logits: Logits, label: Target) -> Scalar:
    return jnp.minimum(cross_entropy(logits, label), _LOSS_CAP)


_AWAY = Aim(
    lead=margin,
    loss=_capped,
    classes=lambda logits, label: (label, wrong_classes(logits, label)[: _CANDIDATES - 1]),
)
_TOWARDS = Aim(
    lead=targeted(margin),
    loss=targeted(cross_entropy),
    classes=lambda logits, target: (wrong_classes(logits, target)[0], target[None]),
)


class Walk(NamedTuple):
    """One image's way over the boundary, which begins at the perturbation that there is."""

    perturbation: Array
    logits: Logits  # of the image so perturbed
    moves: Scalar  # int32


class Search(NamedTuple):
    """Where the search stands between two passes."""

    perturbation: Array
    best: Array  # the perturbation after the pass with most hits, the latest of equals
    hits: Scalar  # int32, how many
    passes: Scalar  # int32


def _seen(threat: Threat, image: Image, perturbation: Array) -> Image:
    """What the model is shown.

    Gradients are taken at this image and used as the perturbation's own. Taken through the clip,
    the pixels at a bound in one image would have no say in what others need there, which is
    most of the pixels where backgrounds are black.
    """
    return jnp.clip(image + perturbation, threat.low, threat.high)


def _universal(
    threat: Threat,
    aim: Aim,
    generator: str,
    *,
    rate: float,
    passes: int,
    steps: int,
    overshoot: float,
    step_size: float | None,
    batch_size: int,
    estimator: Estimator | None,
) -> Universal:
    expect(threat, "a universal perturbation", linf, l2)
    within("rate", rate, above=0.0, high=1.0)
    whole("passes", passes, 1)
    whole("steps", steps, 1)
    within("overshoot", overshoot, 0.0)
    whole("batch_size", batch_size, 1)
    size = _STEP * threat.radius if step_size is None else within("step_size", step_size, above=0.0)
    estimate = usable(estimator)
    euclidean, span = threat._replace(norm=l2), threat.high - threat.low

    def search(key: Key, logits_fn: LogitsFn, images: Array, target: Array) -> Found:
        def deepfool(key: Key, image: Image, logits: Logits, target: Array) -> Array:
            """The shortest step over the nearest boundary, were the model linear."""
            label, others = aim.classes(logits, target)
            boundary = nearest_boundary(euclidean, estimate, logits_fn, key, image, label, others)
            # No pixel goes farther than all its range, however flat the model is.
            return (1.0 + overshoot) * l2.cross(boundary.slope, boundary.level, -span, span)

        def gradient(key: Key, image: Image, target: Array) -> Image:
            def value(key: Key, image: Image) -> tuple[Scalar, tuple[()]]:
                return aim.loss(logits_fn(key, image), target), ()

            return estimate(value)(key, image)[1]

        def fgsm(key: Key, image: Image, logits: Logits, target: Array) -> Array:
            return size * threat.norm.steepest(gradient(key, image, target))

        def alone(perturbation: Array, key: Key, image: Image, target: Array) -> Array:
            """Moved until this image is hit; not at all where that takes too many moves."""
            move, most = (fgsm, 1) if generator == "fgsm" else (deepfool, steps)

            def walk(perturbation: Array, moves: Scalar) -> Walk:
                seen, key_ = _seen(threat, image, perturbation), jax.random.fold_in(key, moves)
                return Walk(perturbation, mean_logits(estimate, logits_fn, key_, seen), moves)

            def on(state: Walk) -> Walk:
                # On the draws that missed: what mends others may leave these as they are.
                key_ = jax.random.fold_in(key, state.moves)
                seen = _seen(threat, image, state.perturbation)
                change = move(key_, seen, state.logits, target)
                return walk(state.perturbation + change, state.moves + 1)

            end = jax.lax.while_loop(
                lambda state: (aim.lead(state.logits, target) <= 0) & (state.moves < most),
                on,
                walk(perturbation, jnp.int32(0)),
            )
            moved = (end.moves > 0) & (aim.lead(end.logits, target) > 0)
            kept = threat.norm.project(end.perturbation, threat.radius)
            return jnp.where(moved, kept, perturbation)

        def together(perturbation: Array, keys: Key, images: Array, targets: Array) -> Array:
            """One steepest step up the mean loss of a batch."""
            seen = _seen(threat, images, perturbation[None])
            mean = jnp.mean(jax.vmap(gradient)(keys, seen, targets), axis=0)
            step = size * threat.norm.steepest(mean)
            return threat.norm.project(perturbation + step, threat.radius)

        count = len(images)
        targets = jnp.broadcast_to(target, (count,))
        batch = min(batch_size, count)
        batched = generator == "sgd"
        improve: Callable[[Array, Key, Array, Array], Array] = together if batched else alone
        turns = (-(-count // batch), batch) if batched else (count,)

        def hits(key: Key, perturbation: Array) -> Scalar:
            def hit(given: tuple[Key, Image, Array]) -> Array:
                key, image, target = given
                seen = _seen(threat, image, perturbation)
                return aim.lead(mean_logits(estimate, logits_fn, key, seen), target) > 0

            given = (jax.random.split(key, count), images, targets)
            return jnp.sum(jax.lax.map(hit, given, batch_size=_TOGETHER), dtype=jnp.int32)

        def go_through(state: Search) -> Search:
            pass_key = jax.random.fold_in(key, state.passes)
            order_key, model_key, count_key = jax.random.split(pass_key, 3)
            keys = jax.random.split(model_key, count)
            # A last batch that is short is filled up with the first images of this order.
            order = jnp.resize(jax.random.permutation(order_key, count), turns)

            def turn(perturbation: Array, place: Array) -> tuple[Array, None]:
                return improve(perturbation, keys[place], images[place], targets[place]), None

            perturbation, _ = jax.lax.scan(turn, state.perturbation, order)
            now = hits(count_key, perturbation)
            best = jnp.where(now >= state.hits, perturbation, state.best)
            return Search(perturbation, best, jnp.maximum(now, state.hits), state.passes + 1)

        # Hits are counted and not averaged: no rounding decides whether they are enough.
        enough = rate * count
        begin_key, key = jax.random.split(key)
        zero = jnp.zeros_like(images[0])
        end = jax.lax.while_loop(
            lambda state: (state.hits < enough) & (state.passes < passes),
            go_through,
            Search(zero, zero, hits(begin_key, zero), jnp.int32(0)),
        )
        return Found(end.best, end.hits / count, end.hits >= enough, end.passes)

    return search


def uap(
    threat: Threat,
    *,
    rate: float = 0.8,
    passes: int = 10,
    generator: Literal["deepfool", "sgd"] = "deepfool",
    steps: int = 10,
    overshoot: float = 0.02,
    step_size: float | None = None,
    batch_size: int = 32,
    estimator: Estimator | None = None,
) -> Universal:
    """Universal adversarial perturbation (Moosavi-Dezfooli et al., arXiv:1610.08401). L-inf, L2.

    `target` is the label [N] that each image is to lose; the network's own predictions make the
    rate the paper's fooling rate, true labels the error rate. The search ends with the first pass
    after which the share `rate` of the images is hit (the paper's 1 - delta), and gives up after
    `passes`; the answer is the perturbation after the best pass, the latest of equals, and zero
    where none is needed. For random models an image is hit where the mean logits over the
    estimator's draws say so.

    - `"deepfool"`, the paper's: image by image, whichever is not hit is led over its nearest
      boundary by L2 DeepFool, of at most `steps` steps and with `overshoot`, and what brought it
      there is added to the perturbation, which is projected onto the threat's ball. One image
      after another by construction.
    - `"sgd"` (Shafahi et al., arXiv:1811.11304): steepest steps (signs, in L-inf) of `step_size`,
      by default a fifth of the radius, up the cross-entropy of batches of `batch_size`, capped at
      9 for each image. Batches make it the faster one.

    Where the authors' code scales a perturbation up to the L2 radius, this one is projected. The
    model sees images within the pixel bounds; the perturbation itself is not bound by them.

    Raises `UsageError` for another norm, or settings out of range.
    """
    one_of("generator", generator, ("deepfool", "sgd"))
    return _universal(
        threat, _AWAY, generator, rate=rate, passes=passes, steps=steps, overshoot=overshoot,
        step_size=step_size, batch_size=batch_size, estimator=estimator,
    )  # fmt: skip


def tup(
    threat: Threat,
    *,
    rate: float = 0.8,
    passes: int = 10,
    generator: Literal["deepfool", "sgd", "fgsm"] = "deepfool",
    steps: int = 50,
    overshoot: float = 0.02,
    step_size: float | None = None,
    batch_size: int = 32,
    estimator: Estimator | None = None,
) -> Universal:
    """Targeted-(delta, eta)-universal perturbation, RAT's (arXiv:2008.07838). L-inf, L2.

    `target` is the one class [] that all images are to be taken for; leave out those of that class,
    which are hit as they are. As `uap`, with delta = 1 - `rate` and eta the threat's radius. The
    class may be traced, so that all of them are one program: `jax.vmap` over keys and targets. It
    runs as long as the slowest class does, and the work that single searches are spared on images
    already hit is then done and thrown away.

    Reconstructed: the abstract and a summary say that vectors are computed for data points near the
    boundary, one after another, and added up to one that takes inputs to the target; no code, nor
    any constant, was published. Ours are the choices
    - of DeepFool towards the target for those vectors, in L2: over the boundary to k, the best
      competing class at each step (a fixed clean label can stall);
    - of all defaults, those of `uap`, with more steps as public targeted versions have them;
    - of the images: any are taken, `boundary_first` picks the ones near the boundary;
    - of two other generators. `"sgd"` is `uap`'s, on the cross-entropy to the target, not capped:
      the fall-back where DeepFool does not converge. `"fgsm"` (Hirano & Takemoto,
      arXiv:1911.06502) goes image by image as `"deepfool"` does, but by one steepest step of
      `step_size`, a fifth of the radius by default, which counts only where it hits the target.

    Raises `UsageError` for another norm, or settings out of range.
    """
    one_of("generator", generator, ("deepfool", "sgd", "fgsm"))
    return _universal(
        threat, _TOWARDS, generator, rate=rate, passes=passes, steps=steps, overshoot=overshoot,
        step_size=step_size, batch_size=batch_size, estimator=estimator,
    )  # fmt: skip


def apply(threat: Threat, perturbation: Array) -> Attack:
    """The attack that adds `perturbation` [H, W, C] to any image, and clips it into the bounds.

    A perturbation of a larger radius is brought into the threat's own first.
    """
    kept = threat.norm.project(perturbation, threat.radius)
    return lambda key, logits_fn, image, target: _seen(threat, image, kept)


def boundary_first(
    logits_fn: LogitsFn, key: Key, images: Array, target: Array, count: int
) -> Array:
    """The `count` images nearest to the boundary of class `target`, the nearest first.

    By |f_t - max_k f_k| over the other classes k, from either side; of a random model, in one draw
    for each image. RAT's small set of points near the boundary, as we read it.

    `images` are [N, H, W, C], the result [count, H, W, C]. Raises `UsageError` unless
    1 <= count <= N.
    """
    whole("count", count, 1, len(images))

    def distance(given: tuple[Key, Image]) -> Scalar:
        return jnp.abs(margin(logits_fn(*given), target))

    given = (jax.random.split(key, len(images)), images)
    distances = jax.lax.map(distance, given, batch_size=_TOGETHER)
    return images[jax.lax.top_k(-distances, count)[1]]
