"""DeepFool against distances that can be derived, and against the authors' loop written out."""

import functools
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
DRAW = np.random.default_rng(1)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
WEIGHTS = DRAW.normal(size=(72, 5)).astype(np.float32)
MIDDLE = np.full(SHAPE, 0.5, np.float32)
KEY = jax.random.key(0)
NEVER = -1e6  # the level of a class that no change of the image brings up


def plane(key, image):
    """Class 0 is right at MIDDLE, on a plane's other side from class 1."""
    return jnp.stack([1.0, jnp.sum(WEIGHT * (image - 0.5))])


def bending(key, image):
    """The wrong classes flatten out before they reach the first one: linear steps fall short."""
    rising = jnp.tanh(jnp.sum((image.reshape(-1, 1) - 0.5) * WEIGHTS, axis=0))
    return jnp.concatenate([jnp.array([0.9]), rising])


@functools.cache
def program(norm, candidates):
    """The answer, its score and its margin on a model of five classes, each the larger of two
    planes. Compiled once for all such models, images, labels and radii.
    """

    @jax.jit
    def whole(radius, steps, image, label, slopes, levels):
        def model(key, image):
            flat = image.reshape(1, -1, 1) - 0.5
            return jnp.max(jnp.sum(flat * slopes, axis=1) + levels, axis=0)

        attack = deepfool(Threat(norm, radius), steps=20, candidates=candidates)
        state = attack.init(KEY, model, image, label)
        state = jax.lax.fori_loop(0, steps, lambda _, state: attack.step(model, state), state)
        found, score = attack.best(model, state)
        return found, score, margin(model(KEY, found), label)

    return whole


def run(norm, *planes, steps, image=MIDDLE, label=0, radius=np.inf, candidates=10):
    """For planes as (class, slope, level), at most two of a class."""
    slopes = np.zeros((2, 72, 5), np.float32)
    levels = np.full((2, 5), NEVER, np.float32)
    for number, slope, level in planes:
        row = int(levels[0, number] != NEVER)
        slopes[row, :, number], levels[row, number] = np.ravel(slope), level
    answers = program(norm, candidates)(float(radius), steps, image, label, slopes, levels)
    return [np.asarray(one) for one in answers]


RIGHT, BEYOND = (0, 0.0, 1.0), (1, WEIGHT, 0.0)  # `plane`


def size(norm, change):
    change = np.abs(np.float64(change))
    return {linf: np.max, l2: np.linalg.norm, l1: np.sum}[norm](change.ravel())


def dual(norm, slope):
    return size({linf: l1, l2: l2, l1: linf}[norm], slope)


@NORMS
def test_finds_the_nearest_image_on_a_plane(norm):
    """In the middle of the cube, and near its corners, where the pixel bounds bind."""
    aside = np.where(np.random.default_rng(0).random(SHAPE) < 0.3, 0.48, -0.48)
    corner = np.float32(0.5 + aside * np.sign(WEIGHT))
    level = 1.0 - np.sum(WEIGHT * (corner - 0.5))
    bound = size(norm, jax.jit(norm.cross)(WEIGHT, level, -corner, 1 - corner))
    assert bound > 1.02 * level / dual(norm, WEIGHT), "no bound binds"

    for image, expected in ((MIDDLE, 1.0 / dual(norm, WEIGHT)), (corner, bound)):
        found, _, lead = run(norm, RIGHT, BEYOND, steps=20, image=image)
        assert lead > 0
        assert np.all((found >= 0) & (found <= 1))
        assert 0.999 <= size(norm, found - image) / expected <= 1.03


@NORMS
def test_goes_to_the_nearest_of_several_classes(norm):
    levels = [2.0, 0.0, 1.5, -1.0, 0.5]
    distances = [
        (levels[0] - levels[k]) / dual(norm, WEIGHTS[:, k] - WEIGHTS[:, 0]) for k in range(1, 5)
    ]
    found, _, lead = run(norm, *((k, WEIGHTS[:, k], levels[k]) for k in range(5)), steps=5)
    assert lead > 0
    assert 0.999 <= size(norm, found - MIDDLE) / min(distances) <= 1.021


def test_only_the_likeliest_classes_are_looked_at():
    """The third class is nearer than the second, but with two candidates it is never tried."""
    left = np.float32(np.arange(72) < 36)
    planes = (0, 0.0, 0.0), (1, left, -1.0), (2, 10 * (1 - left), -2.0)
    found = {k: run(l2, *planes, steps=3, candidates=k)[0] for k in (2, 3)}
    # 36 pixels of one slope each: the distance is the level over the slope and six.
    np.testing.assert_allclose(size(l2, found[2] - MIDDLE), 1.02 * 1.0 / 6, rtol=1e-3)
    np.testing.assert_allclose(size(l2, found[3] - MIDDLE), 1.02 * 0.2 / 6, rtol=1e-3)


@NORMS
def test_nearest_plane_of_a_convex_region(norm):
    """Two classes and a kink: the wrong one is the larger of two planes, nearer by the second."""
    other = np.random.default_rng(4).normal(size=SHAPE).astype(np.float32)
    expected = min(6.0 / dual(norm, WEIGHT), 1.0 / dual(norm, other))
    found, _, lead = run(norm, (0, 0.0, 0.0), (1, WEIGHT, -6.0), (1, other, -1.0), steps=5)
    assert lead > 0
    assert 0.999 <= size(norm, found - MIDDLE) / expected <= 1.021


def test_follows_the_authors_loop():
    """On a curved model in L2, while no pixel bound is met."""

    @jax.jit
    def both(x):
        return bending(KEY, x), jax.jacrev(lambda x: bending(KEY, x))(x)

    def told(x):
        logits, slopes = both(np.asarray(x, np.float32))
        return np.asarray(logits), np.asarray(slopes, np.float64)

    start = x = 0.5 + 0.05 * np.random.default_rng(0).normal(size=SHAPE)
    trail, total = [], np.zeros(SHAPE)
    while int(np.argmax(told(x)[0])) == 0:
        z, g = told(x)
        sizes = [abs(z[k] - z[0]) / np.linalg.norm(g[k] - g[0]) for k in range(1, 6)]
        way = g[1 + int(np.argmin(sizes))] - g[0]
        total = total + min(sizes) * way / np.linalg.norm(way)
        x = start + 1.02 * total
        trail.append(x)
    assert len(trail) >= 3, "one step is no loop"

    @jax.jit
    def whole(image):
        attack = deepfool(Threat(l2, jnp.inf), steps=50)

        def step(state, _):
            state = attack.step(bending, state)
            return state, state.image

        begin = attack.init(KEY, bending, image, 0)
        # The first misclassified image is the answer: further steps leave it as it is.
        state, images = jax.lax.scan(step, begin, length=len(trail) + 3)
        return images, *attack.best(bending, state)

    images, found, score = map(np.asarray, whole(np.float32(start)))
    np.testing.assert_allclose(images[:-3], trail, atol=1e-4)
    np.testing.assert_array_equal(found, images[-1])
    np.testing.assert_allclose(found, trail[-1], atol=1e-4)
    np.testing.assert_allclose(score, 1 / np.linalg.norm(trail[-1] - start), rtol=1e-3)


def test_keeps_to_a_finite_radius():
    distance = 1.0 / dual(l2, WEIGHT)
    for radius, broken in ((2 * distance, True), (0.5 * distance, False)):
        found, score, lead = run(l2, RIGHT, BEYOND, steps=3, radius=radius)
        assert size(l2, found - MIDDLE) <= radius * (1 + 1e-5)
        assert (score > 0) == broken
        assert (lead > 0) == broken


def test_a_misclassified_image_is_its_own_answer():
    found, *_ = run(linf, RIGHT, BEYOND, steps=3, label=1)
    np.testing.assert_array_equal(found, MIDDLE)


@NORMS
def test_an_image_on_the_boundary_leaves_it(norm):
    found, _, lead = run(norm, (0, 0.0, 0.0), BEYOND, steps=3)
    assert lead > 0
    assert np.max(np.abs(found - MIDDLE)) < 1e-5


def test_random_models_are_judged_by_their_mean():
    """A coin in the logits: single draws are often misclassified at once, the mean is not."""

    def noisy(key, image):
        return plane(key, image) + jnp.stack([0.0, 3.0 * jax.random.rademacher(key, ())])

    attack = deepfool(Threat(l2, jnp.inf), steps=5, estimator=eot(400))
    found = np.asarray(jax.jit(lambda x: attack(KEY, noisy, x, 0))(MIDDLE))
    np.testing.assert_allclose(size(l2, found - MIDDLE), 1.0 / dual(l2, WEIGHT), rtol=0.5)


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
