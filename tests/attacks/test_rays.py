"""RayS against distances that can be derived, the published loop written out, and exact counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import rays
from rain_jax.checks import UsageError
from rain_jax.norms import l2, linf
from rain_jax.types import Threat

SHAPE = (6, 6, 2)
WEIGHT = jax.random.normal(jax.random.key(1), SHAPE)
WEIGHTS = jax.random.normal(jax.random.key(3), (72, 5))
GREY = jnp.full(SHAPE, 0.5)
# Black and white pixels among them, where the bounds bind.
IMAGE = jnp.clip(jax.random.uniform(jax.random.key(2), SHAPE, minval=-0.2, maxval=1.2), 0.0, 1.0)
ANY = Threat(linf, jnp.inf)


def plane(key, image):
    return jnp.stack([3.0, jnp.sum(WEIGHT * (image - IMAGE))])


def valley(key, image):
    return jnp.stack([3.0, jnp.abs(jnp.sum(WEIGHT * (image - 0.5)))])


def curved(key, image):
    flat = image.ravel()
    return jnp.sin(4 * flat @ WEIGHTS) * 3 + jnp.cos(9 * flat) @ WEIGHTS


def darker(key, image):
    """Class 1 where the mean is 0.27 below grey: the first ray of all meets it there."""
    return jnp.stack([jnp.mean(image), 0.5 - 0.27])


def nearest_on_the_plane():
    """The radius whose corner within the pixel bounds just reaches the boundary."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        corner = np.clip(np.asarray(IMAGE) + middle * np.sign(WEIGHT), 0, 1)
        reached = np.sum(np.asarray(WEIGHT) * (corner - np.asarray(IMAGE))) >= 3.0
        low, high = (low, middle) if reached else (middle, high)
    return high


def distance(found, clean):
    return float(jnp.max(jnp.abs(found - clean)))


def broken(model, image, label=0):
    return int(jnp.argmax(model(None, image))) != label


def test_finds_the_nearest_corner_on_a_plane(key):
    """Once blocks are single values each sign is tried by itself, and none is wrong in the end.

    But one: a flip that shortens the ray by less than where bisection ends is not seen.
    """
    attack = rays(ANY, queries=1500)
    found = jax.jit(lambda k: attack(k, plane, IMAGE, 0))(key)
    assert broken(plane, found)
    assert 1 - 1e-4 <= distance(found, IMAGE) / nearest_on_the_plane() <= 1.02


def test_finds_the_nearest_corner_beside_a_valley(key):
    attack = rays(ANY, queries=1500)
    found = jax.jit(lambda k: attack(k, valley, GREY, 0))(key)
    assert broken(valley, found)
    nearest = 3.0 / float(jnp.sum(jnp.abs(WEIGHT)))
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
    clean = jax.random.uniform(jax.random.key(number), SHAPE)
    label = int(jnp.argmax(curved(key, clean)))
    attack = rays(ANY, queries=700)
    begin = attack.init(key, curved, clean, label)

    def step(state, _):
        after = attack.step(curved, state)
        return after, (state.image, after.nearest.distance)

    _, (images, distances) = jax.jit(lambda s: jax.lax.scan(step, s, length=700))(begin)
    model = jax.jit(lambda image: curved(key, image))
    expected_images, expected_distances = published(model, np.asarray(clean), label, 700)
    np.testing.assert_allclose(images, expected_images, atol=1e-5)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-5)


def states(attack, model, image, count, key):
    state, seen = attack.init(key, model, image, 0), []
    step = jax.jit(lambda state: attack.step(model, state))
    for _ in range(count):
        state = step(state)
        seen.append(state)
    return seen


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
    attack = rays(Threat(linf, radius), queries=20)
    seen = states(attack, darker, GREY, 20, key)
    counts = [int(attack.queries(state)) for state in seen]
    assert counts == [min(number + 1, asked) for number in range(20)]
    scores = [float(attack.best(darker, state)[1]) for state in seen]
    assert [score > 0 for score in scores] == [radius > 0.2 and n >= asked for n in range(1, 21)]


def test_further_steps_find_nearer_images_alone(key):
    attack = rays(Threat(linf, 0.4), queries=60)
    seen = states(attack, plane, IMAGE, 60, key)
    scores = np.array([attack.best(plane, state)[1] for state in seen])
    first = int(np.argmax(scores > 0))
    assert first > 0
    assert (np.diff(scores[first:]) >= 0).all()
    np.testing.assert_allclose(scores[-1], 1 / seen[-1].nearest.distance, rtol=1e-6)


def test_the_radius_leaves_the_search_as_it_is(key):
    near, anywhere = (states(rays(t, queries=30), plane, IMAGE, 30, key)[-1]
                      for t in (Threat(linf, 0.2), ANY))  # fmt: skip
    np.testing.assert_array_equal(near.nearest.image, anywhere.nearest.image)


def test_nothing_but_the_predicted_class_matters(key):
    def reshaped(key, image):
        return 1e3 * curved(key, image) ** 3 - 7.0

    attack = rays(ANY, queries=200)
    label = int(jnp.argmax(curved(key, GREY)))
    one, other = (
        jax.jit(lambda k, m=m: attack(k, m, GREY, label))(key) for m in (curved, reshaped)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("radius", [0.1, jnp.inf])
def test_finds_nothing_where_nothing_is(radius, key):
    def constant(key, image):
        return jnp.array([1.0, 0.0])

    attack = rays(Threat(linf, radius), queries=10)
    state = states(attack, constant, GREY, 10, key)[-1]
    found, score = attack.best(constant, state)
    assert bool(jnp.all((found >= 0) & (found <= 1)))
    assert score <= 0
    assert attack.queries(state) == 10


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="queries=0"):
        rays(ANY, queries=0)
    with pytest.raises(UsageError, match="norm=l2: RayS expects linf"):
        rays(Threat(l2, 1.0))
