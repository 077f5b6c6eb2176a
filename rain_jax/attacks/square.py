"""The Square attack: random search by squares, from logits alone (arXiv:1912.00049)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.attacks.restarts import restarted
from rain_jax.checks import whole, within
from rain_jax.losses import margin
from rain_jax.norms import expect, l2, linf, project
from rain_jax.remembered import remembered
from rain_jax.types import (
    Array,
    Image,
    Iteration,
    Key,
    LogitsFn,
    Loss,
    Scalar,
    Target,
    Threat,
)

# The published schedule: after so many of 10,000 tries the square's area is halved once more.
_HALVINGS, _TRIES = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000), 10_000
# In L2 no window is narrower than this, and the first image has so many along its shorter side.
_NARROWEST, _ALONG = 3, 5


class Search(NamedTuple):
    """Where one image's search stands."""

    key: Key
    clean: Image
    target: Target
    image: Image  # the best so far, which the next step changes
    loss: Scalar
    score: Scalar  # its margin
    tried: Scalar  # int32, images


def halvings(done: Array, steps: int) -> Array:
    """How often the square's area has been halved when `done` of `steps` tries are over, int32."""
    # floor(10,000 done / steps) > after, kept in whole numbers that cannot overflow.
    due = [-(-(after + 1) * steps // _TRIES) for after in _HALVINGS]
    return jnp.sum(done >= jnp.array(due), dtype=jnp.int32)


def sides(share: float, shape: tuple[int, ...], *, odd: bool) -> list[int]:
    """The square's side after each number of halvings; odd and at least 3 where L2 asks for it."""
    area, room = share * shape[0] * shape[1], min(shape[:2])
    found = [max(round(math.sqrt(area / 2**n)), 1) for n in range(len(_HALVINGS) + 1)]
    if odd:
        found = [max(side, _NARROWEST) // 2 * 2 + 1 for side in found]
        room -= 1 - room % 2
    return [min(side, room) for side in found]


def bump(side: int) -> np.ndarray:
    """[side, side] of L2 norm 1: a hill above a dale, each falling as the paper's pseudo-Gaussian.

    Around the middle of each half, Chebyshev distance d has the sum of 1 / (m + 1)^2 from m = d.
    """

    def hill(height: int) -> np.ndarray:
        rows, columns = np.arange(height) - height // 2, np.arange(side) - side // 2
        distance = np.maximum(np.abs(rows)[:, None], np.abs(columns)[None, :])
        terms = 1.0 / np.arange(1, max(height, side) // 2 + 2) ** 2
        raised = np.cumsum(terms[::-1])[::-1][distance]
        return raised / np.linalg.norm(raised)

    whole = np.concatenate([hill(side // 2), -hill(side - side // 2)])
    return np.asarray(whole / np.linalg.norm(whole), np.float32)


def _window(key: Key, side: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """A random square: the offsets of all rows and columns from its corner, and its mask."""
    room = jnp.array(shape[:2]) - side
    corner = jax.random.randint(key, (2,), 0, room + 1)
    rows, columns = jnp.arange(shape[0]) - corner[0], jnp.arange(shape[1]) - corner[1]
    within_rows, within_columns = ((at >= 0) & (at < side) for at in (rows, columns))
    return rows, columns, (within_rows[:, None] & within_columns[None, :])[:, :, None]


def _stripes(threat: Threat, key: Key, image: Image) -> Image:
    """Vertical stripes at the radius, a sign for each column and channel."""
    sign = jax.random.rademacher(key, (1, *image.shape[1:]), jnp.float32)
    return project(threat, image, image + threat.radius * sign)


def _square(threat: Threat, key: Key, state: Search, side: Array) -> Image:
    """All of a square at the radius, a sign for each channel."""
    place_key, sign_key = jax.random.split(key)
    _, _, inside = _window(place_key, side, state.image.shape)
    sign = jax.random.rademacher(sign_key, (1, 1, state.image.shape[2]), jnp.float32)
    pushed = project(threat, state.clean, state.clean + threat.radius * sign)
    return jnp.where(inside, pushed, state.image)


def _at_radius(threat: Threat, clean: Image, change: Image) -> Image:
    """The change brought to the radius; pixel bounds may shorten it again."""
    return jnp.clip(clean + threat.radius * l2.steepest(change), threat.low, threat.high)


def _tiles(threat: Threat, key: Key, image: Image) -> Image:
    """A grid of bumps, five along the shorter side, each turned and signed at random."""
    height, width, channels = image.shape
    side = max(min(height, width) // _ALONG, 1)
    rows, columns = height // side, width // side
    turn_key, sign_key = jax.random.split(key)
    turned = jax.random.bernoulli(turn_key, shape=(rows, 1, columns, 1, 1))
    sign = jax.random.rademacher(sign_key, (rows, 1, columns, 1, channels), jnp.float32)
    one = bump(side)[None, :, None, :, None]
    tiles = sign * jnp.where(turned, one.swapaxes(1, 3), one)
    change = tiles.reshape(rows * side, columns * side, channels)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    rest = ((top, height - rows * side - top), (left, width - columns * side - left), (0, 0))
    return _at_radius(threat, image, jnp.pad(change, rest))


def _exchange(threat: Threat, key: Key, state: Search, side: Array, bumps: Array) -> Image:
    """One window gives all its change, and what the radius leaves unused, to a bump in another.

    `bumps` [S, S] holds the bump of this side in its corner.
    """
    place_key, other_key, turn_key, sign_key = jax.random.split(key, 4)
    channels = state.image.shape[2]
    rows, columns, into = _window(place_key, side, state.image.shape)
    _, _, out_of = _window(other_key, side, state.image.shape)
    turned = jnp.where(jax.random.bernoulli(turn_key), bumps.T, bumps)
    placed = jnp.take(jnp.take(turned, rows, 0, mode="clip"), columns, 1, mode="clip")[:, :, None]
    sign = jax.random.rademacher(sign_key, (1, 1, channels), jnp.float32)

    def size(part: Array) -> Array:
        return jnp.sqrt(jnp.sum(part**2, axis=(0, 1), keepdims=True))  # of each channel

    change = state.image - state.clean
    there = jnp.where(into, change, 0.0)
    mixed = jnp.where(into, sign * placed, 0.0) + there / (size(there) + 1e-12)
    unused = jnp.maximum(threat.radius**2 - jnp.sum(change**2), 0.0) / channels
    available = jnp.sqrt(unused + size(jnp.where(into | out_of, change, 0.0)) ** 2)
    mixed = mixed / (size(mixed) + 1e-12) * available
    moved = jnp.where(into, mixed, jnp.where(out_of, 0.0, change))
    return _at_radius(threat, state.clean, moved)


@remembered
def square(
    threat: Threat,
    *,
    queries: int = 5000,
    share: float = 0.8,
    answers: int = 1,
    restarts: int = 1,
    loss: Loss = margin,
) -> Iteration:
    """The Square attack in L-inf or L2: keeps a random square's change where `loss` grows.

    `share` of the pixels, in (0, 1], is the first square's area; it shrinks by the published
    schedule, stretched over the steps. 5,000 queries and 0.8 are AutoAttack's. Each image is judged
    by the mean logits of `answers` queries, more than one for random models. Once an image breaks
    the model nothing changes any more, and no more queries are counted (counted where there is one
    run).

    Raises `UsageError` for another norm.
    """
    norms = linf, l2
    expect(threat, "the Square attack", *norms)
    within("share", share, above=0.0, high=1.0)
    whole("answers", answers, 1)
    whole("queries", queries, 2 * answers)
    tries = queries // answers

    def ask(logits_fn: LogitsFn, key: Key, image: Image, target: Target) -> tuple[Scalar, Scalar]:
        logits = jax.vmap(logits_fn, (0, None))(jax.random.split(key, answers), image)
        mean = jnp.mean(logits, axis=0)
        return loss(mean, target), margin(mean, target)

    def propose(key: Key, state: Search) -> Image:
        every = sides(share, state.image.shape, odd=threat.norm is l2)
        halved = halvings(state.tried - 1, tries)
        side = jnp.array(every)[halved]
        if threat.norm is linf:
            return _square(threat, key, state, side)
        bumps = np.stack([np.pad(bump(s), (0, every[0] - s)) for s in every])
        return _exchange(threat, key, state, side, jnp.asarray(bumps)[halved])

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Search:
        start_key, model_key, key = jax.random.split(key, 3)
        begin = (_stripes if threat.norm is linf else _tiles)(threat, start_key, image)
        value, score = ask(logits_fn, model_key, begin, target)
        return Search(key, image, target, begin, value, score, jnp.int32(1))

    def step(logits_fn: LogitsFn, state: Search) -> Search:
        choice_key, model_key = jax.random.split(jax.random.fold_in(state.key, state.tried))
        candidate = propose(choice_key, state)
        value, score = ask(logits_fn, model_key, candidate, state.target)
        going = ~(state.score > 0)
        # Of a random model the loss to beat was a lucky one. Asking about the best image afresh
        # makes it worse: late squares gain less than the noise, which then decides alone.
        better = going & ((value > state.loss) | (score > 0))
        return state._replace(
            image=jnp.where(better, candidate, state.image),
            loss=jnp.where(better, value, state.loss),
            score=jnp.where(better, score, state.score),
            tried=state.tried + going,
        )

    def best(logits_fn: LogitsFn, state: Search) -> tuple[Image, Scalar]:
        return state.image, state.score

    # The first image is no step.
    attack = Iteration(
        init, step, best, tries - 1, lambda state: answers * state.tried,
        uses="logits", draws=answers, norms=norms,
    )  # fmt: skip
    return restarted(attack, restarts)
