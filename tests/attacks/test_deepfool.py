"""DeepFool against distances that can be derived, and against the authors' loop written out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import deepfool
from rain_jax.attacks.deepfool import nearest_boundary
from rain_jax.checks import UsageError
from rain_jax.gradients import eot, exact
from rain_jax.losses import margin
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Threat

NORMS = pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
SHAPE = (6, 6, 2)
WEIGHT = jax.random.normal(jax.random.key(1), SHAPE)
WEIGHTS = jax.random.normal(jax.random.key(2), (72, 5))
MIDDLE = jnp.full(SHAPE, 0.5)


def plane(key, image):
    """Class 0 is right at MIDDLE, on a plane's other side from class 1."""
    return jnp.stack([1.0, jnp.sum(WEIGHT * (image - 0.5))])


def planes(key, image):
    flat = image.reshape(-1, 1) - 0.5
    return jnp.sum(flat * WEIGHTS, axis=0) + jnp.array([2.0, 0.0, 1.5, -1.0, 0.5])


def bending(key, image):
    """The wrong classes flatten out before they reach the first one: linear steps fall short."""
    rising = jnp.tanh(jnp.sum((image.reshape(-1, 1) - 0.5) * WEIGHTS, axis=0))
    return jnp.concatenate([jnp.array([0.9]), rising])


def run(attack, logits_fn, image, label=0):
    """The answer, in one compiled program."""
    return jax.jit(lambda k, x: attack(k, logits_fn, x, label))(jax.random.key(0), image)


def dual(norm, slope):
    return float(jnp.sum(slope * norm.steepest(slope)))


@NORMS
def test_finds_the_nearest_image_on_a_plane(norm, key):
    """In the middle of the cube, and near its corners, where the pixel bounds bind."""
    aside = jax.random.uniform(key, SHAPE) < 0.3
    corner = jnp.where(aside, 0.5 + 0.48 * jnp.sign(WEIGHT), 0.5 - 0.48 * jnp.sign(WEIGHT))
    level = 1.0 - float(jnp.sum(WEIGHT * (corner - 0.5)))
    bound = norm.measure(norm.cross(WEIGHT, level, -corner, 1 - corner))
    assert bound > 1.02 * level / dual(norm, WEIGHT), "no bound binds"

    attack = deepfool(Threat(norm, jnp.inf), steps=20)
    for image, expected in ((MIDDLE, 1.0 / dual(norm, WEIGHT)), (corner, bound)):
        found = run(attack, plane, image)
        assert margin(plane(key, found), 0) > 0
        assert bool(jnp.all((found >= 0) & (found <= 1)))
        assert 0.999 <= norm.measure(found - image) / expected <= 1.03


@NORMS
def test_goes_to_the_nearest_of_several_classes(norm, key):
    leads = planes(key, MIDDLE) - planes(key, MIDDLE)[0]
    distances = [
        -float(leads[k]) / dual(norm, (WEIGHTS[:, k] - WEIGHTS[:, 0]).reshape(SHAPE))
        for k in range(1, 5)
    ]
    found = run(deepfool(Threat(norm, jnp.inf), steps=5), planes, MIDDLE)
    assert margin(planes(key, found), 0) > 0
    assert 0.999 <= norm.measure(found - MIDDLE) / min(distances) <= 1.021


def test_only_the_likeliest_classes_are_looked_at(key):
    """The third class is nearer than the second, but with two candidates it is never tried."""

    def logits_fn(key, image):
        left, right = jnp.sum(image[:3] - 0.5), jnp.sum(image[3:] - 0.5)
        return jnp.stack([0.0, left - 1.0, 10 * right - 2.0])

    found = {
        k: run(deepfool(Threat(l2, jnp.inf), steps=3, candidates=k), logits_fn, MIDDLE)
        for k in (2, 3)
    }
    # 36 pixels of one slope each: the distance is the level over the slope and six.
    np.testing.assert_allclose(l2.measure(found[2] - MIDDLE), 1.02 * 1.0 / 6, rtol=1e-3)
    np.testing.assert_allclose(l2.measure(found[3] - MIDDLE), 1.02 * 0.2 / 6, rtol=1e-3)


@NORMS
def test_nearest_plane_of_a_convex_region(norm, key):
    """Two classes and a kink: the wrong one is the larger of two planes, nearer by the second."""
    other = jax.random.normal(jax.random.key(4), SHAPE)

    def logits_fn(key, image):
        shift = image - 0.5
        first, second = jnp.sum(WEIGHT * shift) - 6.0, jnp.sum(other * shift) - 1.0
        return jnp.stack([0.0, jnp.maximum(first, second)])

    expected = min(6.0 / dual(norm, WEIGHT), 1.0 / dual(norm, other))
    found = run(deepfool(Threat(norm, jnp.inf), steps=5), logits_fn, MIDDLE)
    assert margin(logits_fn(key, found), 0) > 0
    assert 0.999 <= norm.measure(found - MIDDLE) / expected <= 1.021


def test_follows_the_authors_loop(key):
    """On a curved model in L2, while no pixel bound is met."""
    logits = jax.jit(lambda x: bending(key, jnp.float32(x)))
    gradients = jax.jit(jax.jacrev(lambda x: bending(key, x)))
    start = x = 0.5 + 0.05 * np.asarray(jax.random.normal(key, SHAPE), np.float64)
    trail, total = [], np.zeros(SHAPE)
    while int(jnp.argmax(logits(x))) == 0:
        z, g = np.asarray(logits(x)), np.asarray(gradients(jnp.float32(x)), np.float64)
        sizes = [abs(z[k] - z[0]) / np.linalg.norm(g[k] - g[0]) for k in range(1, 6)]
        way = g[1 + int(np.argmin(sizes))] - g[0]
        total = total + min(sizes) * way / np.linalg.norm(way)
        x = start + 1.02 * total
        trail.append(x)
    assert len(trail) >= 3, "one step is no loop"

    attack = deepfool(Threat(l2, jnp.inf), steps=50)
    state = attack.init(key, bending, jnp.float32(start), 0)
    step = jax.jit(lambda state: attack.step(bending, state))
    for expected in trail:
        state = step(state)
        np.testing.assert_allclose(state.image, expected, atol=1e-4)
    # The first misclassified image is the answer: further steps leave it as it is.
    for _ in range(3):
        state = step(state)
    found, score = attack.best(bending, state)
    np.testing.assert_array_equal(found, state.image)
    np.testing.assert_allclose(found, trail[-1], atol=1e-4)
    np.testing.assert_allclose(score, 1 / np.linalg.norm(trail[-1] - start), rtol=1e-3)


def test_keeps_to_a_finite_radius(key):
    distance = 1.0 / dual(l2, WEIGHT)

    @jax.jit
    def score_and_answer(radius):
        attack = deepfool(Threat(l2, radius), steps=3)
        state = attack.init(key, plane, MIDDLE, 0)
        for _ in range(3):
            state = attack.step(plane, state)
        return attack.best(plane, state)

    for radius, broken in ((2 * distance, True), (0.5 * distance, False)):
        found, score = score_and_answer(radius)
        assert l2.measure(found - MIDDLE) <= radius * (1 + 1e-5)
        assert bool(score > 0) == broken
        assert bool(margin(plane(key, found), 0) > 0) == broken


def test_a_misclassified_image_is_its_own_answer(key):
    found = run(deepfool(Threat(linf, jnp.inf), steps=3), plane, MIDDLE, 1)
    np.testing.assert_array_equal(found, MIDDLE)


@NORMS
def test_an_image_on_the_boundary_leaves_it(norm, key):
    def logits_fn(key, image):
        return jnp.stack([0.0, jnp.sum(WEIGHT * (image - 0.5))])

    found = run(deepfool(Threat(norm, jnp.inf), steps=3), logits_fn, MIDDLE)
    assert margin(logits_fn(key, found), 0) > 0
    assert jnp.max(jnp.abs(found - MIDDLE)) < 1e-5


def test_random_models_are_judged_by_their_mean(key):
    """A coin in the logits: single draws are often misclassified at once, the mean is not."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 3.0 * jax.random.rademacher(key, ())])

    found = run(deepfool(Threat(l2, jnp.inf), steps=5, estimator=eot(400)), noisy, MIDDLE)
    np.testing.assert_allclose(l2.measure(found - MIDDLE), 1.0 / dual(l2, WEIGHT), rtol=0.5)


@pytest.mark.parametrize("estimator", [exact(), eot(3)], ids=["exact", "eot"])
def test_all_classes_share_one_forward_pass(estimator, key):
    def logits_fn(key, image):
        return jnp.sum(jnp.sinh(image).reshape(-1, 1) * WEIGHTS, axis=0)

    def boundary(image):
        return nearest_boundary(
            Threat(l2, 1.0), estimator, logits_fn, key, image, 0, jnp.arange(1, 5)
        )

    shapes = re.findall(r"f32\[([\d,]*)\] = sinh", str(jax.make_jaxpr(boundary)(MIDDLE)))
    assert shapes == ["6,6,2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(steps=0), "steps=0"), (dict(candidates=1), "candidates=1"),
     (dict(overshoot=-0.1), "overshoot=-0.1")],
)  # fmt: skip
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        deepfool(Threat(l2, 0.5), **settings)
