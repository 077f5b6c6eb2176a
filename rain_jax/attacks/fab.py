"""FAB: along the decision boundary towards the clean image (Croce & Hein, arXiv:1907.02044)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.attacks.deepfool import mean_logits, nearest_boundary, wrong_classes
from rain_jax.attacks.nearest import Nearest, known, nearer, none_yet, score, within_threat
from rain_jax.attacks.restarts import side_by_side
from rain_jax.checks import whole, within
from rain_jax.gradients import last_finite, usable
from rain_jax.losses import margin
from rain_jax.norms import expect, l1, l2, linf, random_start
from rain_jax.remembered import remembered
from rain_jax.types import (
    Array,
    Estimator,
    Image,
    Iteration,
    Key,
    LogitsFn,
    Scalar,
    Target,
    Threat,
)

_NORMS = linf, l2, l1
# Random starts are drawn within half the radius, or half of these where it is larger: what
# AutoAttack takes where it is told none.
_WIDEST = {linf: 0.3, l2: 1.0, l1: 5.0}
_SMALLEST = 1e-8  # distance to a boundary, so that the shares of two zeros are defined


class Boundaries(NamedTuple):
    """Where one image's way along the boundary stands."""

    key: Key  # for the model's randomness, one fold for each step
    clean: Image
    target: Target
    classes: Array  # int32 [M], whose boundaries are looked at
    image: Image
    nearest: Nearest
    done: Scalar  # int32, steps


def along_boundary(
    threat: Threat,
    *,
    steps: int,
    alpha_max: float,
    eta: float,
    beta: float,
    estimator: Estimator | None = None,
    rank: Any = None,
    run: Any = 0,
) -> Iteration:
    """One run of FAB, `run` 0 from the clean image and others from random ones around it.

    It looks at the boundaries to all wrong classes, or with a `rank` to the wrong class of that
    rank on the clean image alone, 0 for the likeliest.
    """
    estimate = usable(estimator)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Boundaries:
        start_key, clean_key, key = jax.random.split(key, 3)
        logits = mean_logits(estimate, logits_fn, clean_key, image)
        classes = wrong_classes(logits, target)
        if rank is not None:
            classes = classes[rank][None]
        reach = jnp.minimum(threat.radius, _WIDEST[threat.norm]) / 2
        start = random_start(threat._replace(radius=reach), start_key, image)
        begin = jnp.where(run == 0, image, start)
        nearest = nearer(threat, image, none_yet(image), image, margin(logits, target) > 0)
        return Boundaries(key, image, target, classes, begin, nearest, jnp.int32(0))

    def step(logits_fn: LogitsFn, state: Boundaries) -> Boundaries:
        image, clean = state.image, state.clean
        here_key, there_key = jax.random.split(jax.random.fold_in(state.key, state.done))
        slope, level, logits = nearest_boundary(
            threat, estimate, logits_fn, here_key, image, state.target, state.classes
        )
        nearest = nearer(threat, clean, state.nearest, image, margin(logits, state.target) > 0)

        # --- project this image and the clean one onto the same plane, and go between the two
        points = jnp.stack([image, clean])
        levels = jnp.stack([level, level + jnp.sum(slope * (image - clean))])
        cross = jax.vmap(threat.norm.cross, (None, 0, 0, 0))
        changes = cross(slope, levels, threat.low - points, threat.high - points)
        sizes = jnp.maximum(jax.vmap(threat.norm.measure)(changes), _SMALLEST)
        alpha = jnp.minimum(sizes[0] / jnp.sum(sizes), alpha_max)
        ahead = points + eta * changes
        moved = (1.0 - alpha) * ahead[0] + alpha * ahead[1]
        moved = last_finite(jnp.clip(moved, threat.low, threat.high), image)

        # --- where that is across the boundary, back towards the clean image
        logits = mean_logits(estimate, logits_fn, there_key, moved)
        broken = margin(logits, state.target) > 0
        return state._replace(
            image=jnp.where(broken, clean + beta * (moved - clean), moved),
            nearest=nearer(threat, clean, nearest, moved, broken),
            done=state.done + 1,
        )

    def best(logits_fn: LogitsFn, state: Boundaries) -> tuple[Image, Scalar]:
        found = within_threat(threat, state.clean, state.nearest, state.image)
        key = jax.random.fold_in(state.key, state.done)
        lead = margin(mean_logits(estimate, logits_fn, key, found), state.target)
        # Pulled into the threat, an image found beyond it may still be misclassified.
        nearest = nearer(threat, state.clean, state.nearest, found, lead > 0)
        return found, score(threat, nearest, lead)

    return Iteration(
        init, step, best, steps, seen=lambda state: known(threat, state.nearest),
        uses=estimate.uses, draws=estimate.draws, norms=_NORMS, minimum_norm=True,
    )  # fmt: skip


def _check(
    threat: Threat, steps: int, restarts: int, alpha_max: float, eta: float, beta: float
) -> None:
    expect(threat, "FAB", *_NORMS)
    whole("steps", steps, 1)
    whole("restarts", restarts, 1)
    within("alpha_max", alpha_max, 0.0, 1.0)
    within("eta", eta, 1.0)
    within("beta", beta, 0.0, 1.0)


@remembered
def fab(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    estimator: Estimator | None = None,
) -> Iteration:
    """FAB, untargeted: the nearest misclassified image (Croce & Hein, arXiv:1907.02044).

    Each step takes a linear model of the nearest boundary, projects the image and the clean one
    onto it, goes `eta` of those ways and mixes the ends, the clean one's with a weight of at most
    `alpha_max`. Once misclassified it goes back to `beta` of the distance; where it is then is
    judged too. As in AutoAttack there is no final line search. L-inf, L2 and L1; a step costs a
    backward pass for each wrong class, so with many classes take `fab_t`.

    At a finite radius the answer keeps to it; with `radius=inf` it is the nearest image found. A
    misclassified image is its own answer. The first run starts at the image, each of the other
    `restarts` at random within half the radius; the nearest answer is returned.

    Raises `UsageError` for another norm, or a setting out of range.
    """
    _check(threat, steps, restarts, alpha_max, eta, beta)

    def runs(run: Any) -> Iteration:
        return along_boundary(
            threat, steps=steps, alpha_max=alpha_max, eta=eta, beta=beta,
            estimator=estimator, run=run,
        )  # fmt: skip

    return side_by_side(runs, restarts, steps)


@remembered
def fab_t(
    threat: Threat,
    *,
    steps: int = 100,
    targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    estimator: Estimator | None = None,
) -> Iteration:
    """FAB-T: `fab` towards one class at a time, each of the likeliest wrong ones in its own runs.

    `targets` of them side by side, or all the others where there are fewer. Each step costs each
    of them one backward pass, however many classes there are. Any misclassified image counts,
    whatever its class. See `fab` for the rest.
    """
    _check(threat, steps, restarts, alpha_max, eta, beta)
    whole("targets", targets, 1)

    def runs(number: Any) -> Iteration:
        return along_boundary(
            threat, steps=steps, alpha_max=alpha_max, eta=eta, beta=beta,
            estimator=estimator, rank=number // restarts, run=number % restarts,
        )  # fmt: skip

    return side_by_side(runs, lambda classes: restarts * min(targets, classes - 1), steps)
