"""Ascent on estimated gradients: NES (arXiv:1804.08598) and SPSA (arXiv:1802.05666).

They see logits alone, stop at the first image that breaks the model, and count what they asked.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rain_jax import gradients
from rain_jax.attacks.pgd import Ascent, ascent, steepest_step
from rain_jax.attacks.restarts import restarted
from rain_jax.checks import pixel_distance, whole, within
from rain_jax.losses import margin
from rain_jax.norms import linf
from rain_jax.remembered import remembered
from rain_jax.types import Image, Iteration, Key, LogitsFn, Loss, Scalar, Target, Threat


class Asking(NamedTuple):
    """Where one image's ascent stands."""

    image: Image  # the ascent's own
    asked: Scalar  # int32, queries, those about this image itself among them
    ascent: Ascent


def counted(attack: Iteration, *, draws: int, answers: int) -> Iteration:
    """`attack`, an ascent, until an image breaks the model; then nothing changes any more.

    At each image the attacker asks about it `answers` times, and unless that breaks the model,
    twice for each of `draws` directions: so many queries are counted.
    """

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Asking:
        state = attack.init(key, logits_fn, image, target)
        return Asking(state.image, jnp.int32(answers), state)

    def step(logits_fn: LogitsFn, state: Asking) -> Asking:
        moved = attack.step(logits_fn, state.ascent)
        # It moves after it has looked: what it left was broken or not.
        asked = state.asked + jnp.where(moved.score > 0, 0, 2 * draws + answers)
        return jax.tree.map(
            partial(jnp.where, state.ascent.score > 0), state, Asking(moved.image, asked, moved)
        )

    def best(logits_fn: LogitsFn, state: Asking) -> tuple[Image, Scalar]:
        return attack.best(logits_fn, state.ascent)

    def seen(state: Asking) -> tuple[Image, Scalar]:
        return state.ascent.found, state.ascent.score

    return attack._replace(
        init=init, step=step, best=best, queries=lambda state: state.asked, seen=seen
    )


@remembered
def nes(
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    decay: float = 0.9,
    draws: int = 25,
    scale: float = 0.001,
    answers: int = 1,
    restarts: int = 1,
    loss: Loss = margin,
) -> Iteration:
    """Steepest steps along the running mean of NES gradients, from the image itself.

    `decay` is the mean's, 0.9 as the authors have it; `draws`, `scale` and `answers` are those of
    `gradients.nes`. `step_size` is as for PGD, in pixel values measured in the threat's norm, by
    default 2.5 x radius / steps. Queries are counted where there is one run: (2 x `draws` +
    `answers`) a step and `answers` for the last image, unless one breaks the model before.
    """
    whole("steps", steps, 1)
    within("decay", decay, 0.0, below=1.0)
    if step_size is None:
        step_size = 2.5 * threat.radius / steps
    else:
        _check_step(threat.norm is linf, step_size)
    climb = optax.chain(optax.trace(decay), steepest_step(threat, step_size))
    estimator = gradients.nes(draws, scale, answers)
    attack = ascent(threat, climb, steps=steps, loss=loss, estimator=estimator, start="clean")
    return restarted(counted(attack, draws=draws, answers=answers), restarts)


@remembered
def spsa(
    threat: Threat,
    *,
    steps: int = 100,
    step_size: float = 0.01,
    draws: int = 128,
    scale: float = 0.01,
    answers: int = 1,
    restarts: int = 1,
    loss: Loss = margin,
) -> Iteration:
    """Adam on SPSA gradients, from a random start.

    `step_size` is Adam's, in pixel values for each pixel whatever the norm. Made for L-inf: in L2
    and L1 it ends somewhat short of the best point even of a linear model. `draws`, `scale` and
    `answers` are those of `gradients.spsa`. Queries are counted as for `nes`.
    """
    _check_step(True, step_size)
    climb = optax.chain(optax.scale_by_adam(), optax.scale(step_size))
    estimator = gradients.spsa(draws, scale, answers)
    attack = ascent(threat, climb, steps=steps, loss=loss, estimator=estimator)
    return restarted(counted(attack, draws=draws, answers=answers), restarts)


def _check_step(by_pixel: bool, size: float) -> None:
    """A step longer than all pixel values is a slip, where it is one pixel's."""
    if by_pixel:
        pixel_distance("step_size", size)
    within("step_size", size, above=0.0)
