"""Carlini & Wagner against distances that can be derived, and against the paper's loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import carlini_wagner
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import margin
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Threat

SHAPE = (6, 6, 2)
DRAW = np.random.default_rng(1)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
WEIGHTS = DRAW.normal(size=(72, 5)).astype(np.float32)
MIDDLE = np.full(SHAPE, 0.5, np.float32)
HALF = (np.arange(72) < 36).reshape(SHAPE)
ASIDE = DRAW.random(SHAPE) < 0.3
KEY = jax.random.key(0)
# Black and white pixels alone.
EXTREME = np.float32(DRAW.random(SHAPE) < 0.5)
NORMS = pytest.mark.parametrize("norm", [l2, linf], ids=["l2", "linf"])


def plane(key, image):
    """Class 0 is right at MIDDLE, on a plane's other side from class 1."""
    return jnp.stack([5.0, jnp.sum(WEIGHT * (image - 0.5))])


def wedge(key, image):
    """Broken on the far side of two planes at once, each over half of the pixels."""
    along = WEIGHT * (image - 0.5)
    sides = jnp.sum(jnp.where(HALF, along, 0.0)) - 6.0, jnp.sum(jnp.where(HALF, 0.0, along)) - 4.0
    return jnp.stack([0.0, jnp.minimum(*sides)])


def curved(key, image):
    """Five classes with many bends."""
    flat = image.reshape(-1, 1)
    return jnp.sum(jnp.sin(3 * flat * WEIGHTS) + 0.3 * jnp.cos(9 * flat) * WEIGHTS, axis=0)


@functools.cache
def program(norm, model, steps, **settings):
    """The answer, its score and the states before each step.

    Compiled once for all images, labels, radii and confidences.
    """

    @jax.jit
    def whole(radius, image, label, confidence):
        attack = carlini_wagner(
            Threat(norm, radius), steps=steps, confidence=confidence, **settings
        )
        state = attack.init(KEY, model, image, label)
        state, trail = jax.lax.scan(
            lambda state, _: (attack.step(model, state), state), state, length=attack.steps
        )
        return *attack.best(model, state), trail

    return whole


def drive(
    norm, model, steps, *, radius=np.inf, image=MIDDLE, label=0, confidence=0.0, **settings
):  # fmt: skip
    run = program(norm, model, steps, **settings)
    found, score, trail = run(float(radius), image, label, confidence)
    return np.asarray(found), np.asarray(score), trail


def size(norm, change):
    change = np.abs(np.float64(change))
    return np.max(change) if norm is linf else np.linalg.norm(change.ravel())


def dual(norm, slope):
    slope = np.abs(np.float64(slope))
    return np.sum(slope) if norm is linf else np.linalg.norm(slope.ravel())


def cross(norm, *arguments):
    return size(norm, jax.jit(norm.cross)(*arguments))


def nearest_on_plane(norm, image):
    """The distance from `image` to the far side, within the pixel bounds."""
    level = 5.0 - np.sum(WEIGHT * (image - 0.5))
    return cross(norm, WEIGHT, level, -image, 1 - image)


@NORMS
@pytest.mark.parametrize("reach", [0.0, 0.48, 0.5], ids=["middle", "aside", "ends"])
def test_finds_the_nearest_image_on_a_plane(norm, reach):
    """In the middle of the cube, where pixel bounds bind, and from its very corner."""
    towards = np.where(ASIDE, 1.0, -1.0) * np.sign(WEIGHT)
    image = np.float32(0.5 + reach * towards)
    expected = nearest_on_plane(norm, image)
    free = (5.0 - np.sum(WEIGHT * (image - 0.5))) / dual(norm, WEIGHT)
    assert (expected > 1.05 * free) == (reach > 0), "no bound binds"

    found, score, _ = drive(norm, plane, 9000, image=image)
    distance = size(norm, found - image)
    assert np.all((found >= 0) & (found <= 1))
    assert 0.9999 <= distance / expected <= 1.05
    np.testing.assert_allclose(score, 1 / distance, rtol=1e-5)


@NORMS
def test_finds_the_edge_between_two_planes(norm):
    """The shares of the pixels are disjoint, so the two smallest changes make up the smallest."""
    parts = [
        cross(norm, np.where(half, WEIGHT, np.float32(0.0)), level, -MIDDLE, 1 - MIDDLE)
        for level, half in ((6.0, HALF), (4.0, ~HALF))
    ]
    expected = np.linalg.norm(parts, ord=norm.order)
    found, score, _ = drive(norm, wedge, 3600)
    assert score > 0
    assert 0.9999 <= size(norm, found - MIDDLE) / expected <= 1.05


@NORMS
def test_confidence_is_a_margin(norm):
    found, _, _ = drive(norm, plane, 3600, confidence=2.0)
    distance = 7.0 / dual(norm, WEIGHT)
    assert 0.9999 <= size(norm, found - MIDDLE) / distance <= 1.05


def test_follows_the_published_loop():
    """L2, point by point over three searches, the first of which fails."""
    image = np.float64(np.float32(0.3 + 0.4 * np.random.default_rng(2).random(SHAPE)))
    label = int(np.argmax(jax.jit(curved)(KEY, np.float32(image))))
    length, rate, initial = 12, 0.02, 0.001

    @jax.jit
    def lead_and_slope(x):
        lead = lambda x: margin(curved(KEY, x), label)
        return lead(x), jax.grad(lambda x: jnp.maximum(-lead(x), 0.0))(x)

    start = np.arctanh((2 * image - 1) * (1 - 1e-6))
    constant, failed, enough, best = initial, 0.0, np.inf, np.inf
    trail, outcomes = [], []
    for _ in range(3):
        point, first, second, succeeded = start, 0.0, 0.0, False
        for number in range(1, length + 1):
            now = (np.tanh(point) + 1) / 2
            trail.append((now, constant))
            lead, slope = lead_and_slope(np.float32(now))
            if lead > 0:
                succeeded, best = True, min(best, np.linalg.norm(now - image))
            gradient = 2 * (now - image)
            gradient += constant * np.asarray(slope, np.float64)
            gradient *= (1 - np.tanh(point) ** 2) / 2
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            mean, spread = first / (1 - 0.9**number), np.sqrt(second / (1 - 0.999**number))
            point = point - rate * mean / (spread + 1e-8)
        outcomes.append(succeeded)
        failed, enough = (failed, constant) if succeeded else (constant, enough)
        constant = (failed + enough) / 2 if np.isfinite(enough) else constant * 10
    assert outcomes == [False, True, True]

    found, _, states = drive(
        l2, curved, 3 * length, image=np.float32(image), label=label,
        searches=3, step_size=rate, initial_constant=initial,
    )  # fmt: skip
    images, constants = zip(*trail, strict=True)
    np.testing.assert_allclose(states.image, images, atol=1e-4)
    np.testing.assert_allclose(states.trial.constant, constants, rtol=1e-5)
    np.testing.assert_allclose(size(l2, found - image), best, rtol=1e-4)


def test_the_search_closes_in_on_the_least_constant_that_is_enough():
    """The least of |change|^2 + c (5 - <w, change>) is at c w / 2: across the plane for large c."""
    trial = jax.tree.map(np.asarray, drive(l2, plane, 9000)[2].trial)
    tried = np.asarray(trial.constant)[::1000]
    np.testing.assert_allclose(tried[:4], [0.001, 0.01, 0.1, 1.0], rtol=1e-6)
    least = 2 * 5.0 / np.sum(WEIGHT**2)
    assert 0.1 < least < 1.0
    assert trial.failed[-1] <= 1.01 * least
    assert trial.enough[-1] >= 0.9 * least
    np.testing.assert_allclose(trial.enough[-1] - trial.failed[-1], 0.9 / 2**4, rtol=1e-4)


def test_the_bound_stays_between_what_failed_and_what_was_found():
    _, _, states = drive(linf, plane, 3600)
    trial, distance = jax.tree.map(np.asarray, (states.trial, states.nearest.distance))
    assert trial.bound[0] == 1
    rounds = np.flatnonzero(np.asarray(states.taken) == 0)[1:]
    met = rounds[np.isfinite(distance[rounds])]
    bound, failed = trial.bound[met], trial.failed[met]
    np.testing.assert_allclose(
        bound, np.maximum(0.9 * distance[met], (failed + distance[met]) / 2), rtol=1e-5
    )
    assert rounds[0] < 400, "the first round ends at once, with the first broken image"
    assert 0 < failed[-1] < bound[-1] < distance[-1]


@NORMS
def test_a_finite_radius_is_kept(norm):
    """Short of the plane the answer goes towards it; beyond, it is the nearest image."""
    distance = nearest_on_plane(norm, MIDDLE)
    found, score, _ = drive(norm, plane, 3600, radius=0.8 * distance)
    assert size(norm, found - MIDDLE) <= 0.8 * distance * (1 + 1e-5)
    assert -1.3 <= score < 0
    right, wrong = np.asarray(plane(KEY, found))
    np.testing.assert_allclose(score, wrong - right, atol=1e-5)

    found, score, _ = drive(norm, plane, 3600, radius=1.2 * distance)
    assert score > 0
    assert size(norm, found - MIDDLE) <= 1.05 * distance


@NORMS
def test_a_misclassified_image_is_its_own_answer(norm):
    found, score, _ = drive(norm, plane, 3600, image=EXTREME, label=1)
    np.testing.assert_array_equal(found, EXTREME)
    assert score > 1e6


@NORMS
def test_without_a_gradient_nothing_moves(norm):
    def flat(key, image):
        return jnp.array([1.0, 0.0])

    found, score, _ = drive(norm, flat, 20, radius=0.1, image=EXTREME, searches=2)
    np.testing.assert_allclose(found, EXTREME, atol=1e-5)
    assert score == -1


@NORMS
def test_random_models_are_judged_by_their_mean(norm):
    """What a lucky draw says of an image is no distance; the mean over many draws has one."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 10.0 * jax.random.normal(key)])

    shares = {}
    for draws in (1, 256):
        found, score, _ = drive(norm, noisy, 360, estimator=eot(draws))
        assert score > 0
        shares[draws] = size(norm, found - MIDDLE) / nearest_on_plane(norm, MIDDLE)
    assert shares[1] < 0.3
    assert 0.5 < shares[256] < 1.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=5, searches=6), "searches=6"),
        (dict(step_size=0.0), "step_size=0.0"),
        (dict(confidence=-1.0), "confidence=-1.0"),
        (dict(initial_constant=0.0), "initial_constant=0.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        carlini_wagner(Threat(l2, 0.5), **settings)


def test_l1_is_refused():
    with pytest.raises(UsageError, match=r"norm=l1: Carlini & Wagner expects l2 or linf"):
        carlini_wagner(Threat(l1, 0.5))
