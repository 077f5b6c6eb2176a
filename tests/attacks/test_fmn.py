"""FMN and DDN against distances that can be derived, and against the papers' loops written out."""

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
WEIGHT = jax.random.normal(jax.random.key(1), SHAPE)
WEIGHTS = jax.random.normal(jax.random.key(2), (72, 5))
MIDDLE = jnp.full(SHAPE, 0.5)
HALF = (jnp.arange(72) < 36).reshape(SHAPE)
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


def run(attack, logits_fn, image, label=0, key=0):
    """The answer and its score, in one compiled program."""

    def whole(key, image):
        state = attack.init(key, logits_fn, image, label)
        state, _ = jax.lax.scan(
            lambda state, _: (attack.step(logits_fn, state), None), state, length=attack.steps
        )
        return attack.best(logits_fn, state)

    return jax.jit(whole)(jax.random.key(key), image)


def dual(norm, slope):
    return float(jnp.sum(slope * norm.steepest(slope)))


@EACH
def test_finds_the_nearest_image_on_a_plane(maker, norm, key):
    """In the middle of the cube, and near its corners, where the pixel bounds bind."""
    aside = jax.random.uniform(key, SHAPE) < 0.3
    corner = jnp.where(aside, 0.5 + 0.48 * jnp.sign(WEIGHT), 0.5 - 0.48 * jnp.sign(WEIGHT))
    level = 1.0 - float(jnp.sum(WEIGHT * (corner - 0.5)))
    bound = norm.measure(norm.cross(WEIGHT, level, -corner, 1 - corner))
    assert bound > 1.02 * level / dual(norm, WEIGHT), "no bound binds"

    attack = maker(Threat(norm, jnp.inf), steps=100)
    for image, expected in ((MIDDLE, 1.0 / dual(norm, WEIGHT)), (corner, bound)):
        found, score = run(attack, plane, image)
        distance = norm.measure(found - image)
        assert bool(jnp.all((found >= 0) & (found <= 1)))
        assert 0.9999 <= distance / expected <= 1.02
        np.testing.assert_allclose(score, 1 / distance, rtol=1e-5)


@EACH
def test_finds_the_edge_between_two_planes(maker, norm):
    """The shares of the pixels are disjoint, so the two smallest changes make up the smallest."""
    parts = [
        norm.measure(norm.cross(jnp.where(half, WEIGHT, 0.0), level, -MIDDLE, 1 - MIDDLE))
        for level, half in ((6.0, HALF), (4.0, ~HALF))
    ]
    expected = np.linalg.norm(parts, ord=norm.order)
    found, score = run(maker(Threat(norm, jnp.inf), steps=200), wedge, MIDDLE)
    assert score > 0
    assert 0.9999 <= norm.measure(found - MIDDLE) / expected <= 1.05


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


@EACH
def test_follows_the_published_loop(maker, norm, key):
    """Point by point while rounding allows it, and to the same distance in the end."""
    steps, image = 60, 0.3 + 0.4 * jax.random.uniform(key, SHAPE)
    label = int(jnp.argmax(curved(key, image)))
    loss = margin if maker is fmn else cross_entropy
    lead = jax.jit(lambda x: margin(curved(key, x), label))
    gradient = jax.jit(jax.grad(lambda x: loss(curved(key, x), label)))
    trail, best = published(
        maker, norm, steps, np.asarray(image, np.float64),
        lambda x: float(lead(jnp.asarray(x, jnp.float32))),
        lambda x: np.asarray(gradient(jnp.asarray(x, jnp.float32)), np.float64),
    )  # fmt: skip
    attack = maker(Threat(norm, jnp.inf, low=-9.0, high=9.0), steps=steps)
    state = attack.init(key, curved, image, label)
    step = jax.jit(lambda state: attack.step(curved, state))
    for number in range(steps):
        state = step(state)
        if number < 12:
            np.testing.assert_allclose(state.image, trail[number][0], atol=1e-4)
            np.testing.assert_allclose(state.radius, trail[number][1], rtol=1e-3)
    assert np.isfinite(best)
    np.testing.assert_allclose(state.nearest.distance, best, rtol=0.01)


@EACH
def test_a_finite_radius_is_all_that_is_used(maker, norm, key):
    """Short of the plane, as near to it as can be; beyond, the nearest image as without one."""
    distance = 1.0 / dual(norm, WEIGHT)
    found, score = run(maker(Threat(norm, 0.8 * distance), steps=100), plane, MIDDLE)
    assert norm.measure(found - MIDDLE) <= 0.8 * distance * (1 + 1e-5)
    assert score == pytest.approx(-0.2, abs=0.01)
    np.testing.assert_allclose(score, margin(plane(key, found), 0), atol=1e-6)

    found, score = run(maker(Threat(norm, 1.5 * distance), steps=100), plane, MIDDLE)
    assert score > 0
    assert norm.measure(found - MIDDLE) <= 1.02 * distance


@EACH
def test_once_broken_never_worse(maker, norm, key):
    image = jax.random.uniform(key, SHAPE)
    label = int(jnp.argmax(curved(key, image)))
    nearest = run(maker(Threat(norm, jnp.inf), steps=30), curved, image, label)[0]
    attack = maker(Threat(norm, 1.2 * norm.measure(nearest - image)), steps=30)

    def step(state, _):
        state = attack.step(curved, state)
        return state, attack.best(curved, state)[1]

    begin = attack.init(key, curved, image, label)
    scores = jax.jit(lambda begin: jax.lax.scan(step, begin, length=30)[1])(begin)
    broken = np.asarray(scores)[np.asarray(scores) > 0]
    assert scores[-1] > 0
    assert np.all(np.diff(broken) >= 0)
    assert len(np.unique(broken)) > 2


@EACH
def test_a_misclassified_image_is_its_own_answer(maker, norm):
    found, score = run(maker(Threat(norm, jnp.inf), steps=10), plane, MIDDLE, label=1)
    np.testing.assert_array_equal(found, MIDDLE)
    assert score > 1e6


@EACH
def test_without_a_gradient_nothing_moves(maker, norm):
    def flat(key, image):
        return jnp.array([1.0, 0.0])

    found, score = run(maker(Threat(norm, jnp.inf), steps=10), flat, MIDDLE)
    np.testing.assert_array_equal(found, MIDDLE)
    assert score <= 0


def test_random_models_are_judged_by_their_mean():
    """What a lucky draw says of an image is no distance; the mean over many draws has one."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 3.0 * jax.random.normal(key)])

    shares = {}
    for draws in (1, 512):
        attack = fmn(Threat(linf, jnp.inf), steps=40, estimator=eot(draws))
        found, score = run(attack, noisy, MIDDLE)
        assert score > 0
        shares[draws] = float(linf.measure(found - MIDDLE)) * dual(linf, WEIGHT)
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
