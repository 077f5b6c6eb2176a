"""RayS against distances that can be derived, the published loop written out, and exact counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import rays
from rain_jax.checks import UsageError
from rain_jax.norms import l2, linf
from rain_jax.types import Threat

SHAPE = (6, 6, 2)
DRAW = np.random.default_rng(1)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
WEIGHTS = DRAW.normal(size=(72, 5)).astype(np.float32)
GREY = np.full(SHAPE, 0.5, np.float32)
# Black and white pixels among them, where the bounds bind.
IMAGE = np.clip(DRAW.uniform(-0.2, 1.2, SHAPE), 0.0, 1.0).astype(np.float32)
ANY = Threat(linf, jnp.inf)


def plane(key, image):
    return jnp.stack([3.0, jnp.sum(WEIGHT * (image - IMAGE))])


def valley(key, image):
    return jnp.stack([3.0, jnp.abs(jnp.sum(WEIGHT * (image - 0.5)))])


def curved(key, image):
    flat = image.ravel()
    return jnp.sin(4 * flat @ WEIGHTS) * 3 + jnp.cos(9 * flat) @ WEIGHTS


def constant(key, image):
    return jnp.array([1.0, 0.0])


def darker(key, image):
    """Class 1 where the mean is 0.27 below grey: the first ray of all meets it there."""
    return jnp.stack([jnp.mean(image), 0.5 - 0.27])


def nearest_on_the_plane():
    """The radius whose corner within the pixel bounds just reaches the boundary."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        corner = np.clip(IMAGE + middle * np.sign(WEIGHT), 0, 1)
        reached = np.sum(WEIGHT * (corner - IMAGE)) >= 3.0
        low, high = (low, middle) if reached else (middle, high)
    return high


def distance(found, clean):
    return float(np.max(np.abs(found - clean)))


def answer(model, image, queries, key, label=0):
    """That of an attack on any image, and the class that the model takes it for."""
    attack = rays(ANY, queries=queries)

    @jax.jit
    def run(key, image):
        found = attack(key, model, image, label)
        return found, jnp.argmax(model(key, found))

    return map(np.asarray, run(key, image))


def test_finds_the_nearest_corner_on_a_plane(key):
    """Once blocks are single values each sign is tried by itself, and none is wrong in the end.

    But one: a flip that shortens the ray by less than where bisection ends is not seen.
    """
    found, predicted = answer(plane, IMAGE, 1500, key)
    assert predicted != 0
    assert 1 - 1e-4 <= distance(found, IMAGE) / nearest_on_the_plane() <= 1.02


def test_finds_the_nearest_corner_beside_a_valley(key):
    found, predicted = answer(valley, GREY, 1500, key)
    assert predicted != 0
    nearest = 3.0 / float(np.sum(np.abs(WEIGHT)))
    assert 1 - 1e-4 <= distance(found, GREY) / nearest <= 1.02


def published(model, clean, label, budget):
    """Algorithms 1 to 3 of arXiv:2006.12792 for one image: what was asked, and the best distance.

    As in the authors' code lengths are measured in L2 and blocks cut with channels first.
    """
    height, width, channels = clean.shape
    size, unit = clean.size, np.sqrt(np.float32(clean.size))
    asked, distances, best = [], [], np.inf

    class OutOfBudget(Exception):
        pass

    def ask(signs, length):
        nonlocal best
        ray = signs.reshape(channels, height, width).transpose(1, 2, 0)
        image = np.clip(clean + np.float32(length) / unit * ray, 0, 1).astype(np.float32)
        asked.append(image)
        wrong = int(np.argmax(model(image))) != label
        if wrong:
            best = min(best, np.max(np.abs(image - clean)))
        distances.append(best)
        if len(asked) == budget:
            raise OutOfBudget
        return wrong

    signs, length, level, block = np.ones(size, np.float32), np.inf, 0, 0
    try:
        while True:
            step = int(np.ceil(size / 2**level))
            tried = signs.copy()
            tried[block * step : (block + 1) * step] *= -1
            if ask(tried, length):
                low, high = 0.0, min(length, unit)
                while high - low > 1e-3:
                    middle = (low + high) / 2
                    low, high = (low, middle) if ask(tried, middle) else (middle, high)
                if high < length:
                    signs, length = tried, high
            block += 1
            if block == 2**level or block * step >= size:
                level, block = level + 1, 0
    except OutOfBudget:
        return np.stack(asked), np.array(distances)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_follows_the_published_loop(number, key):
    """Question by question, down to blocks of single values and round again."""
    clean = np.random.default_rng(number).random(SHAPE, np.float32)
    label = int(np.argmax(logits_of(clean)))
    images, distances = asked(key, clean, label)
    expected_images, expected_distances = published(logits_of, clean, label, 700)
    np.testing.assert_allclose(images, expected_images, atol=1e-5)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-5)


@jax.jit
def logits_of(image):
    return curved(None, image)


@jax.jit
def asked(key, image, label):
    """What `curved` is asked, and the best distance after each answer."""
    attack = rays(ANY, queries=700)

    def step(state, _):
        after = attack.step(curved, state)
        return after, (state.image, after.nearest.distance)

    return jax.lax.scan(step, attack.init(key, curved, image, label), length=700)[1]


@functools.cache
def program(model, count):
    """After each query: how many were counted, the score, the answer and the nearest image.

    Compiled once for all radii and images.
    """

    @jax.jit
    def run(key, radius, image):
        attack = rays(Threat(linf, radius), queries=count)

        def step(state, _):
            state = attack.step(model, state)
            found, score = attack.best(model, state)
            return state, (attack.queries(state), score, found, state.nearest)

        return jax.lax.scan(step, attack.init(key, model, image, 0), length=count)[1]

    return run


def driven(radius, model, image, count, key):
    return jax.tree.map(np.asarray, program(model, count)(key, float(radius), image))


@pytest.mark.parametrize(
    ("radius", "asked"),
    [
        (jnp.inf, 1),  # a black image is the first that is broken
        (0.4, 4),  # 0, then 0.5, 0.25 and 0.375 darker
        (0.3, 6),  # 0.3125 and 0.28125
        (0.1, 20),  # never: all of them
    ],
)
def test_counts_queries_until_it_is_within_the_radius(radius, asked, key):
    counts, scores, *_ = driven(radius, darker, GREY, 20, key)
    assert counts.tolist() == [min(number + 1, asked) for number in range(20)]
    broken = [radius > 0.2 and n >= asked for n in range(1, 21)]
    assert (scores > 0).tolist() == broken


def test_further_steps_find_nearer_images_alone(key):
    _, scores, _, nearest = driven(0.4, plane, IMAGE, 60, key)
    first = int(np.argmax(scores > 0))
    assert first > 0
    assert (np.diff(scores[first:]) >= 0).all()
    np.testing.assert_allclose(scores[-1], 1 / nearest.distance[-1], rtol=1e-6)


def test_the_radius_leaves_the_search_as_it_is(key):
    near, anywhere = (driven(radius, plane, IMAGE, 60, key)[-1] for radius in (0.2, np.inf))
    np.testing.assert_array_equal(near.image, anywhere.image)


def test_nothing_but_the_predicted_class_matters(key):
    def reshaped(key, image):
        return 1e3 * curved(key, image) ** 3 - 7.0

    label = int(np.argmax(logits_of(GREY)))
    one, other = (answer(model, GREY, 200, key, label) for model in (curved, reshaped))
    np.testing.assert_array_equal(*(found for found, _ in (one, other)))


@pytest.mark.parametrize("radius", [0.1, jnp.inf])
def test_finds_nothing_where_nothing_is(radius, key):
    counts, scores, found, _ = driven(radius, constant, GREY, 10, key)
    assert np.all((found[-1] >= 0) & (found[-1] <= 1))
    assert scores[-1] <= 0
    assert counts[-1] == 10


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="queries=0"):
        rays(ANY, queries=0)
    with pytest.raises(UsageError, match="norm=l2: RayS expects linf"):
        rays(Threat(l2, 1.0))
