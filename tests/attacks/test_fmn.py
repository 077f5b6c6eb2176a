"""FMN and DDN against distances that can be derived, and against the papers' loops written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import ddn, fmn
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import cross_entropy, margin
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Threat

SHAPE = (6, 6, 2)
DRAW = np.random.default_rng(1)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
WEIGHTS = DRAW.normal(size=(72, 5)).astype(np.float32)
MIDDLE = np.full(SHAPE, 0.5, np.float32)
HALF = (np.arange(72) < 36).reshape(SHAPE)
KEY = jax.random.key(0)
EACH = pytest.mark.parametrize(
    ("maker", "norm"),
    [(fmn, linf), (fmn, l2), (fmn, l1), (ddn, l2)],
    ids=["fmn-linf", "fmn-l2", "fmn-l1", "ddn"],
)


def plane(key, image):
    """Class 0 is right at MIDDLE, on a plane's other side from class 1."""
    return jnp.stack([1.0, jnp.sum(WEIGHT * (image - 0.5))])


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
def program(maker, norm, model, steps):
    """The answer, its score, the model's logits there, and scores and states on the way.

    Compiled once for all images, labels and threats.
    """

    @jax.jit
    def whole(radius, low, high, image, label):
        attack = maker(Threat(norm, radius, low, high), steps=steps)

        def step(state, _):
            state = attack.step(model, state)
            return state, (*attack.best(model, state), state._replace(key=()))

        begin = attack.init(KEY, model, image, label)
        found, scores, states = jax.lax.scan(step, begin, length=steps)[1]
        return found[-1], scores[-1], model(KEY, found[-1]), scores, states

    return whole


def run(maker, norm, model, steps, *, radius=np.inf, low=0.0, high=1.0, image=MIDDLE, label=0):
    answers = program(maker, norm, model, steps)(float(radius), low, high, image, label)
    return jax.tree.map(np.asarray, answers)


def size(norm, change):
    change = np.abs(np.float64(change))
    return {linf: np.max, l2: np.linalg.norm, l1: np.sum}[norm](change.ravel())


def dual(norm, slope):
    return size({linf: l1, l2: l2, l1: linf}[norm], slope)


def cross(norm, *arguments):
    return size(norm, jax.jit(norm.cross)(*arguments))


@EACH
def test_finds_the_nearest_image_on_a_plane(maker, norm):
    """In the middle of the cube, and near its corners, where the pixel bounds bind."""
    aside = np.where(np.random.default_rng(0).random(SHAPE) < 0.3, 0.48, -0.48)
    corner = np.float32(0.5 + aside * np.sign(WEIGHT))
    level = 1.0 - np.sum(WEIGHT * (corner - 0.5))
    bound = cross(norm, WEIGHT, level, -corner, 1 - corner)
    assert bound > 1.02 * level / dual(norm, WEIGHT), "no bound binds"

    for image, expected in ((MIDDLE, 1.0 / dual(norm, WEIGHT)), (corner, bound)):
        found, score, *_ = run(maker, norm, plane, 100, image=image)
        distance = size(norm, found - image)
        assert np.all((found >= 0) & (found <= 1))
        assert 0.9999 <= distance / expected <= 1.02
        np.testing.assert_allclose(score, 1 / distance, rtol=1e-5)


@EACH
def test_finds_the_edge_between_two_planes(maker, norm):
    """The shares of the pixels are disjoint, so the two smallest changes make up the smallest."""
    parts = [
        cross(norm, np.where(half, WEIGHT, np.float32(0.0)), level, -MIDDLE, 1 - MIDDLE)
        for level, half in ((6.0, HALF), (4.0, ~HALF))
    ]
    expected = np.linalg.norm(parts, ord=norm.order)
    found, score, *_ = run(maker, norm, wedge, 200)
    assert score > 0
    assert 0.9999 <= size(norm, found - MIDDLE) / expected <= 1.05


def published_ball(change, norm, radius):
    """The nearest change of size `radius`, without pixel bounds."""
    size = np.abs(change)
    if norm is linf:
        return np.clip(change, -radius, radius)
    if norm is l2:
        return change * min(1.0, radius / max(np.linalg.norm(change), 1e-12))
    if size.sum() <= radius:
        return change
    falling = np.sort(size.ravel())[::-1]
    cuts = (np.cumsum(falling) - radius) / np.arange(1, size.size + 1)
    return np.sign(change) * np.maximum(size - cuts[np.nonzero(falling > cuts)[0][-1]], 0)


def published(maker, norm, steps, image, lead, gradient):
    """Algorithm 1 of arXiv:2102.12827, or of arXiv:1811.09600, for one image without bounds."""
    norms = {id(linf): (np.inf, 1), id(l2): (2, 2), id(l1): (1, np.inf)}
    own, other = norms[id(norm)]
    change, best = np.zeros_like(image), np.inf
    radius = np.inf if maker is fmn else 1.0
    trail = []
    for number in range(steps):
        share = (1 + np.cos(np.pi * number / steps)) / 2
        size = 0.01 + (1 - 0.01) * share
        gamma = 0.001 + (0.05 - 0.001) * share if maker is fmn else 0.05
        now, slope = lead(image + change), gradient(image + change)
        if now > 0:
            best = min(best, np.linalg.norm(change.ravel(), own))
            radius = min(radius * (1 - gamma), best) if maker is fmn else radius * (1 - gamma)
        elif np.isfinite(best) or maker is ddn:
            radius = radius * (1 + gamma)
        else:
            radius = np.linalg.norm(change.ravel(), own) - now / np.linalg.norm(
                slope.ravel(), other
            )
        change = change + size * slope / np.linalg.norm(slope)
        if maker is fmn:
            change = published_ball(change, norm, radius)
        else:
            change = change * radius / np.linalg.norm(change)
        trail.append((image + change, radius))
    return trail, best


@functools.cache
def slopes(loss):
    """On `curved`: the margin, and the gradient of `loss`, on images of any precision."""
    both = jax.jit(
        lambda x, label: (
            margin(curved(KEY, x), label),
            jax.grad(lambda x: loss(curved(KEY, x), label))(x),
        )
    )
    told = lambda x, label: both(np.asarray(x, np.float32), label)
    return (
        lambda x, label: float(told(x, label)[0]),
        lambda x, label: np.asarray(told(x, label)[1], np.float64),
    )


def predicted(image):
    return int(np.argmax(jax.jit(curved)(KEY, image)))


@EACH
def test_follows_the_published_loop(maker, norm):
    """Point by point while rounding allows it, and to the same distance in the end."""
    steps, image = 60, np.float32(0.3 + 0.4 * np.random.default_rng(0).random(SHAPE))
    label = predicted(image)
    lead, gradient = slopes(margin if maker is fmn else cross_entropy)
    trail, best = published(
        maker, norm, steps, np.asarray(image, np.float64),
        lambda x: lead(x, label), lambda x: gradient(x, label),
    )  # fmt: skip
    *_, told = run(maker, norm, curved, steps, low=-9.0, high=9.0, image=image, label=label)
    np.testing.assert_allclose(told.image[:12], [point for point, _ in trail[:12]], atol=1e-4)
    np.testing.assert_allclose(told.radius[:12], [radius for _, radius in trail[:12]], rtol=1e-3)
    assert np.isfinite(best)
    np.testing.assert_allclose(told.nearest.distance[-1], best, rtol=0.01)


@EACH
def test_a_finite_radius_is_all_that_is_used(maker, norm):
    """Short of the plane, as near to it as can be; beyond, the nearest image as without one."""
    distance = 1.0 / dual(norm, WEIGHT)
    found, score, (right, wrong), *_ = run(maker, norm, plane, 100, radius=0.8 * distance)
    assert size(norm, found - MIDDLE) <= 0.8 * distance * (1 + 1e-5)
    assert score == pytest.approx(-0.2, abs=0.01)
    np.testing.assert_allclose(score, wrong - right, atol=1e-6)

    found, score, *_ = run(maker, norm, plane, 100, radius=1.5 * distance)
    assert score > 0
    assert size(norm, found - MIDDLE) <= 1.02 * distance


@EACH
def test_once_broken_never_worse(maker, norm):
    image = np.random.default_rng(0).random(SHAPE, np.float32)
    label = predicted(image)
    nearest, *_ = run(maker, norm, curved, 60, image=image, label=label)
    radius = 1.2 * size(norm, nearest - image)
    *_, scores, _ = run(maker, norm, curved, 60, radius=radius, image=image, label=label)
    broken = scores[scores > 0]
    assert scores[-1] > 0
    assert np.all(np.diff(broken) >= 0)
    assert len(np.unique(broken)) > 2


@EACH
def test_a_misclassified_image_is_its_own_answer(maker, norm):
    found, score, *_ = run(maker, norm, plane, 100, label=1)
    np.testing.assert_array_equal(found, MIDDLE)
    assert score > 1e6


@EACH
def test_without_a_gradient_nothing_moves(maker, norm):
    def flat(key, image):
        return jnp.array([1.0, 0.0])

    found, score, *_ = run(maker, norm, flat, 10)
    np.testing.assert_array_equal(found, MIDDLE)
    assert score <= 0


def test_random_models_are_judged_by_their_mean():
    """What a lucky draw says of an image is no distance; the mean over many draws has one."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 3.0 * jax.random.normal(key)])

    shares = {}
    for draws in (1, 512):
        maker = functools.partial(fmn, estimator=eot(draws))
        found, score, *_ = run(maker, linf, noisy, 40)
        assert score > 0
        shares[draws] = size(linf, found - MIDDLE) * dual(linf, WEIGHT)
    assert 0.7 < shares[512] < 1.1
    assert not 0.7 < shares[1] < 1.1


@pytest.mark.parametrize(
    ("maker", "settings", "message"),
    [
        (fmn, dict(steps=0), "steps=0"),
        (fmn, dict(step_size=0.0), "step_size=0.0"),
        (fmn, dict(gamma=0.0005), "gamma=0.0005"),
        (ddn, dict(gamma=1.0), "gamma=1.0"),
        (ddn, dict(initial_radius=0.0), "initial_radius=0.0"),
    ],
)
def test_bad_settings_are_refused(maker, settings, message):
    with pytest.raises(UsageError, match=message):
        maker(Threat(l2, 0.5), **settings)


def test_ddn_is_for_l2():
    with pytest.raises(UsageError, match=r"norm=l1: DDN expects l2"):
        ddn(Threat(l1, 0.5))
