"""Smallest perturbations by gradient steps inside a ball whose radius adapts: FMN and DDN."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rain_jax.attacks.deepfool import mean_logits
from rain_jax.attacks.nearest import Nearest, known, nearer, none_yet, score, within_threat
from rain_jax.checks import whole, within
from rain_jax.gradients import last_finite, usable
from rain_jax.losses import cross_entropy, margin
from rain_jax.norms import expect, l1, l2, linf, project
from rain_jax.remembered import remembered
from rain_jax.types import (
    Estimator,
    Image,
    Iteration,
    Key,
    Logits,
    LogitsFn,
    Loss,
    Norm,
    Scalar,
    Target,
    Threat,
)

# The steps shrink to this share of the first one, and FMN's gamma to this value (both papers').
_LAST_STEP, _LAST_GAMMA = 0.01, 0.001


class Shell(NamedTuple):
    """Where one image's search stands."""

    key: Key  # for the model's randomness, one fold for each step
    clean: Image
    target: Target
    image: Image
    radius: Scalar  # of the ball that the image was put in
    done: Scalar  # int32, steps
    nearest: Nearest


class Seen(NamedTuple):
    """What a step learns at the image where it begins."""

    margin: Scalar
    gradient: Image  # of the loss
    annealed: Scalar  # falls from 1 to 0 over the steps, as a cosine


def _search(
    threat: Threat,
    *,
    norms: tuple[Norm, ...],
    steps: int,
    step_size: float,
    loss: Loss,
    first_radius: float,
    resize: Callable[[Shell, Seen], Scalar],
    onto: Callable[[Image, Image, Scalar], Image],
    estimator: Estimator | None,
) -> Iteration:
    """Climbs `loss` by unit L2 steps, each put by `onto(clean, image, radius)` where it may be.

    No radius is larger than the threat's own, or than it takes to reach every allowed image.
    """
    whole("steps", steps, 1)
    within("step_size", step_size, above=0.0)
    estimate = usable(estimator)

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Shell:
        radius = jnp.float32(first_radius)
        return Shell(key, image, target, image, radius, jnp.int32(0), none_yet(image))

    def step(logits_fn: LogitsFn, state: Shell) -> Shell:
        def value(key: Key, image: Image) -> tuple[Scalar, Logits]:
            logits = logits_fn(key, image)
            return loss(logits, state.target), logits

        key = jax.random.fold_in(state.key, state.done)
        (_, logits), gradient = estimate(value)(key, state.image)
        lead = margin(logits, state.target)
        state = state._replace(
            nearest=nearer(threat, state.clean, state.nearest, state.image, lead > 0)
        )

        annealed = (1.0 + jnp.cos(math.pi / steps * state.done)) / 2
        farthest = threat.norm.measure(
            jnp.maximum(state.clean - threat.low, threat.high - state.clean)
        )
        most = jnp.minimum(farthest, threat.radius)
        radius = jnp.minimum(resize(state, Seen(lead, gradient, annealed)), most)
        size = step_size * (_LAST_STEP + (1.0 - _LAST_STEP) * annealed)
        moved = onto(state.clean, state.image + size * l2.steepest(gradient), radius)
        image = last_finite(moved, state.image)
        return state._replace(image=image, radius=radius, done=state.done + 1)

    def best(logits_fn: LogitsFn, state: Shell) -> tuple[Image, Scalar]:
        key = jax.random.fold_in(state.key, state.done)  # the next step's: one verdict on an image

        def judge(nearest: Nearest, image: Image) -> tuple[Nearest, Scalar]:
            lead = margin(mean_logits(estimate, logits_fn, key, image), state.target)
            return nearer(threat, state.clean, nearest, image, lead > 0), lead

        nearest, _ = judge(state.nearest, state.image)
        found = within_threat(threat, state.clean, nearest, state.image)
        # Within the threat only after it was pulled there: it may still be misclassified.
        nearest, lead = judge(nearest, found)
        return found, score(threat, nearest, lead)

    return Iteration(
        init, step, best, steps, seen=lambda state: known(threat, state.nearest),
        uses=estimate.uses, draws=estimate.draws, norms=norms, minimum_norm=True,
    )  # fmt: skip


@remembered
def fmn(
    threat: Threat,
    *,
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    estimator: Estimator | None = None,
) -> Iteration:
    """Fast Minimum-Norm attack (Pintor et al., arXiv:2102.12827); L-inf, L2 and L1.

    Until an image breaks, the ball reaches as far as the margin's linear model says the boundary
    is; from then on it shrinks by `gamma` where the image is broken, else grows by it. `gamma`, at
    least 0.001, falls to that, and `step_size`, in L2 whatever the norm, to a hundredth. Steps end
    at the nearest point of ball and pixel bounds together, where the paper projects onto one after
    the other. At a finite radius the ball is never larger than the threat's.
    """
    norms = linf, l2, l1
    expect(threat, "FMN", *norms)
    within("gamma", gamma, _LAST_GAMMA, below=1.0)
    norm = threat.norm

    def resize(state: Shell, seen: Seen) -> Scalar:
        rate = _LAST_GAMMA + (gamma - _LAST_GAMMA) * seen.annealed
        shrunk = jnp.minimum(state.radius * (1.0 - rate), state.nearest.distance)
        # The margin over what a step of size 1 gains: the gradient's size in the dual norm.
        slope = jnp.sum(seen.gradient * norm.steepest(seen.gradient))
        beyond = jnp.abs(seen.margin) / jnp.maximum(slope, 1e-12)
        ahead = norm.measure(state.image - state.clean) + beyond
        found = jnp.isfinite(state.nearest.distance)
        grown = jnp.where(found, state.radius * (1.0 + rate), ahead)
        return jnp.where(seen.margin > 0, shrunk, grown)

    def onto(clean: Image, image: Image, radius: Scalar) -> Image:
        return project(threat._replace(radius=radius), clean, image)

    return _search(
        threat, norms=norms, steps=steps, step_size=step_size, loss=margin, first_radius=math.inf,
        resize=resize, onto=onto, estimator=estimator,
    )  # fmt: skip


@remembered
def ddn(
    threat: Threat,
    *,
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    initial_radius: float = 1.0,
    estimator: Estimator | None = None,
) -> Iteration:
    """Decoupled direction and norm (Rony et al., arXiv:1811.09600), without its rounding; L2.

    Climbs cross-entropy on a sphere around the image, then clips to the pixel bounds. The sphere
    begins at `initial_radius`, shrinks by `gamma` where the image is broken and else grows by it.
    `step_size` falls to a hundredth. At a finite radius the sphere is never larger than the
    threat's.
    """
    expect(threat, "DDN", l2)
    within("gamma", gamma, above=0.0, below=1.0)
    within("initial_radius", initial_radius, above=0.0)

    def resize(state: Shell, seen: Seen) -> Scalar:
        return state.radius * jnp.where(seen.margin > 0, 1.0 - gamma, 1.0 + gamma)

    def onto(clean: Image, image: Image, radius: Scalar) -> Image:
        sphere = clean + radius * l2.steepest(image - clean)
        return jnp.clip(sphere, threat.low, threat.high)

    return _search(
        threat, norms=(l2,), steps=steps, step_size=step_size, loss=cross_entropy,
        first_radius=initial_radius, resize=resize, onto=onto, estimator=estimator,
    )  # fmt: skip
