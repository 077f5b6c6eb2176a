"""The Square attack against its published parts, optima that can be derived, and exact counts."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import square
from rain_jax.attacks.square import bump, halvings, sides
from rain_jax.checks import UsageError
from rain_jax.losses import cross_entropy, margin
from rain_jax.norms import l1, l2, linf
from rain_jax.types import Threat

SHAPE = (6, 6, 2)
DRAW = np.random.default_rng(1)
WEIGHT = DRAW.normal(size=SHAPE).astype(np.float32)
GREY = np.full(SHAPE, 0.5, np.float32)
# Black and white pixels among them, where the bounds bind.
IMAGE = np.clip(DRAW.uniform(-0.2, 1.2, SHAPE), 0.0, 1.0).astype(np.float32)
CORNER = np.clip(IMAGE + np.float32(0.1) * np.sign(WEIGHT), 0.0, 1.0)


def plane(key, image):
    """A margin that climbs along WEIGHT and is -1 at the best corner."""
    return jnp.stack([1.0, jnp.sum(WEIGHT * (image - CORNER)), -9.0])


def counting(breaks_at=None):
    """A model that counts its calls and is broken from one of them on; for runs outside of jit."""
    calls = []

    def logits_fn(key, image):
        calls.append(image)
        return jnp.array([0.0, 1.0 if breaks_at and len(calls) >= breaks_at else -1.0])

    return calls, logits_fn


def published_share(number, queries):
    """The schedule of arXiv:1912.00049, rescaled to the number of queries."""
    number = int(number / queries * 10000)
    share = 0.8
    for after in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        if number > after:
            share /= 2
    return share


@pytest.mark.parametrize("queries", [10000, 5000, 777, 20])
def test_squares_shrink_as_published(queries):
    halved = jax.jit(jax.vmap(lambda done: halvings(done, queries)))(jnp.arange(queries))
    table = np.array(sides(0.8, (32, 32, 3), odd=False))
    expected = [
        max(round((published_share(number, queries) * 1024) ** 0.5), 1) for number in range(queries)
    ]
    np.testing.assert_array_equal(table[halved], expected)


@pytest.mark.parametrize(
    ("shape", "odd", "expected"),
    [
        ((28, 28, 1), True, [25, 19, 13, 9, 7, 5, 3, 3, 3, 3]),
        ((4, 9, 1), True, [3] * 10),  # an odd window has to fit, too
        ((4, 9, 1), False, [4, 4, 3, 2, 1, 1, 1, 1, 1, 1]),
        ((1, 1, 3), True, [1] * 10),
    ],
)
def test_squares_fit_into_the_image(shape, odd, expected):
    assert sides(0.8, shape, odd=odd) == expected


@functools.cache
def published_bump(side):
    """Centred rectangles, each a pixel wider all round and added with less weight."""

    def hill(height):
        raised = np.zeros((height, side))
        for ring in range(max(height // 2, side // 2) + 1):
            top, left = height // 2 - ring, side // 2 - ring
            raised[
                max(top, 0) : min(top + 2 * ring + 1, height),
                max(left, 0) : min(left + 2 * ring + 1, side),
            ] += 1 / (ring + 1) ** 2
        return raised / np.sqrt(np.sum(raised**2))

    whole = np.concatenate([hill(side // 2), -hill(side - side // 2)])
    return whole / np.sqrt(np.sum(whole**2))


@pytest.mark.parametrize("side", [2, 3, 5, 6, 7, 29])
def test_bumps_are_the_published_ones(side):
    np.testing.assert_allclose(bump(side), published_bump(side), atol=1e-6)


@pytest.mark.parametrize("loss", [margin, cross_entropy], ids=lambda f: f.__name__)
def test_reaches_the_corner_of_the_cube(loss, key):
    """Single pixels have the last nine tenths of the steps: 1800 of them, where each of 36 pixels
    asks for one of four sign patterns. That one of them is never drawn is less likely than 2e-4.
    """
    attack = square(Threat(linf, 0.1), queries=2000, loss=loss)
    found = jax.jit(lambda k: attack(k, plane, IMAGE, 0))(key)
    np.testing.assert_allclose(found, CORNER, atol=1e-6)


def test_crosses_a_kink(key):
    """The margin climbs from a valley to both sides, equally far: either corner is the best."""

    def valley(key, image):
        return jnp.stack([100.0, jnp.abs(jnp.sum(WEIGHT * (image - 0.5)))])

    attack = square(Threat(linf, 0.1), queries=2000)
    reached = jax.jit(lambda k: valley(k, attack(k, valley, GREY, 0))[1])(key)
    np.testing.assert_allclose(reached, 0.1 * np.sum(np.abs(WEIGHT)), rtol=1e-5)


def climbs(attack, image, steps, key):
    """The images of a search that takes every candidate."""

    def right(key, image):
        return jnp.array([1.0, 0.0])

    def step(state, _):
        state = attack.step(right, state._replace(loss=jnp.float32(-jnp.inf)))
        return state, state.image

    @jax.jit
    def whole(key, image):
        begin = attack.init(key, right, image, 0)
        return begin.image, jax.lax.scan(step, begin, length=steps)[1]

    first, images = map(np.asarray, whole(key, image))
    return np.concatenate([first[None], images])


def test_a_step_in_linf_changes_one_square_to_a_sign_for_each_channel(key):
    attack, shape = square(Threat(linf, 0.1), queries=501), (9, 7, 2)
    images = climbs(attack, np.full(shape, 0.5, np.float32), 500, key)
    # the first image: stripes from top to bottom
    np.testing.assert_allclose(np.abs(images[0] - 0.5), 0.1, atol=1e-6)
    np.testing.assert_array_equal(images[0], np.broadcast_to(images[0][:1], shape))
    table, ever = np.array(sides(0.8, shape, odd=False)), np.zeros(shape, bool)
    every = table[jax.jit(jax.vmap(lambda done: halvings(done, 501)))(np.arange(500))]
    for number in range(500):
        before, after = images[number], images[number + 1]
        changed = before != after
        ever |= changed
        rows, columns, _ = np.nonzero(changed)
        side = every[number]
        if not len(rows):
            continue  # the square had these signs already
        assert np.ptp(rows) < side
        assert np.ptp(columns) < side
        for channel in range(2):
            assert len(np.unique(after[..., channel][changed[..., channel]])) <= 1
    assert ever.all()  # the last row and column, too


def test_a_step_in_l2_keeps_the_radius_and_moves_between_two_windows(key):
    attack, shape = square(Threat(l2, 0.5), queries=301), (9, 11, 2)
    images = climbs(attack, np.full(shape, 0.5, np.float32), 300, key)
    sizes = np.sqrt(np.sum((images - 0.5) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(sizes, 0.5, rtol=1e-5)
    ever = np.zeros(shape, bool)
    for before, after in itertools.pairwise(images[100:]):
        # Outside both windows the change keeps its direction: it is at most rescaled.
        changed = (np.abs(after - before) > 1e-6).any(axis=2)
        ever[changed] = True
        emptied = np.all(np.abs(after - 0.5) < 1e-7, axis=2) & changed
        assert emptied.sum() <= 9  # one window of 3 x 3
    assert ever.all()


def published_l2(draw, slope, radius, steps):
    """Algorithms 1 and 3 of arXiv:1912.00049 on grey, for a margin that climbs along `slope`."""
    height, width, channels = slope.shape
    table = sides(0.8, slope.shape, odd=True)

    def turned(side):
        pattern = published_bump(side)
        return (pattern.T if draw.random() < 0.5 else pattern)[:, :, None] * draw.choice(
            [-1, 1], channels
        )

    def size(part):
        return np.sqrt(np.sum(part**2, axis=(0, 1)))

    change, side = np.zeros(slope.shape), height // 5
    for top in range(0, height, side):
        for left in range(0, width, side):
            change[top : top + side, left : left + side] = turned(side)
    change *= radius / np.sqrt(np.sum(change**2))
    for number in range(steps):
        side = table[round(np.log2(0.8 / published_share(number, steps + 1)))]
        corners = draw.integers(0, [height - side + 1, width - side + 1], (2, 2))
        into, out_of = (np.s_[top : top + side, left : left + side] for top, left in corners)
        either = np.zeros(slope.shape)
        either[into] = either[out_of] = 1
        unused = max(radius**2 - np.sum(change**2), 0) / channels
        available = np.sqrt(unused + size(change * either) ** 2)
        mixed = turned(side) + change[into] / (1e-12 + size(change[into]))
        candidate = change.copy()
        candidate[out_of] = 0
        candidate[into] = mixed / (1e-12 + size(mixed)) * available
        candidate *= radius / np.sqrt(np.sum(candidate**2))
        if np.sum(candidate * slope) > np.sum(change * slope):
            change = candidate
    return np.sum(change * slope)


def test_l2_climbs_as_far_as_the_published_loop(key):
    """From other draws, so on average over many runs, within what such averages vary by."""
    slope = np.random.default_rng(5).normal(size=(10, 10, 2)).astype(np.float32)

    def climbing(key, image):
        return jnp.stack([100.0, jnp.sum(slope * (image - 0.5))])

    attack = square(Threat(l2, 0.5), queries=151)
    grey = np.full(slope.shape, 0.5, np.float32)
    run = jax.jit(jax.vmap(lambda k: attack(k, climbing, grey, 0)))
    found = np.asarray(run(jax.random.split(key, 64)))
    reached = np.sum((found - 0.5) * slope, axis=(1, 2, 3))
    draw = np.random.default_rng(0)
    expected = np.array([published_l2(draw, slope, 0.5, 150) for _ in range(64)])
    spread = np.sqrt((np.var(reached) + np.var(expected)) / 64)
    assert spread < 0.04 * np.mean(expected)
    assert abs(np.mean(reached) - np.mean(expected)) < 3 * spread


@pytest.mark.parametrize("norm", [linf, l2], ids=["linf", "l2"])
@pytest.mark.parametrize("breaks_at", [1, 5])
def test_counts_queries_until_it_breaks_and_changes_nothing_after(norm, breaks_at, key):
    calls, logits_fn = counting(breaks_at)
    attack = square(Threat(norm, 0.1), queries=20)
    state = attack.init(key, logits_fn, GREY, 0)
    while len(calls) < breaks_at:
        assert attack.queries(state) == len(calls)
        assert attack.best(logits_fn, state)[1] < 0
        state = attack.step(logits_fn, state)
    assert attack.queries(state) == breaks_at
    assert attack.best(logits_fn, state)[1] > 0
    np.testing.assert_array_equal(state.image, calls[-1])
    after = attack.step(logits_fn, attack.step(logits_fn, state))
    chex.assert_trees_all_equal(after._replace(key=0), state._replace(key=0))


@pytest.mark.parametrize(
    ("queries", "answers", "asked"), [(9, 1, 9), (2, 1, 2), (20, 3, 18), (6, 3, 6)]
)
def test_keeps_to_the_budget(queries, answers, asked, key):
    # Each call stands for all answers, which are drawn side by side.
    calls, logits_fn = counting()
    attack = square(Threat(linf, 0.1), queries=queries, answers=answers)
    state = attack.init(key, logits_fn, GREY, 0)
    for _ in range(attack.steps):
        state = attack.step(logits_fn, state)
    assert attack.queries(state) == asked == len(calls) * answers <= queries


def test_random_models_are_climbed_by_the_mean_of_their_answers(key):
    """Noise of a fifth of all there is to climb hides what most squares gain."""
    reach = 0.1 * np.sum(np.abs(WEIGHT))

    def noisy(key, image):
        noise = 0.2 * reach * jax.random.normal(key)
        return jnp.stack([1000.0, jnp.sum(WEIGHT * (image - 0.5)) + noise])

    def reached(answers):
        attack = square(Threat(linf, 0.1), queries=300 * answers, answers=answers)
        found = jax.jit(jax.vmap(lambda k: attack(k, noisy, GREY, 0)))(jax.random.split(key, 8))
        return np.mean(np.sum(WEIGHT * (np.asarray(found) - 0.5), axis=(1, 2, 3))) / reach

    assert reached(32) > reached(1) + 0.2


def test_asks_for_no_gradient(key):
    """A loop of unknown length, which cannot be differentiated backwards."""

    def looped(key, image):
        total = jax.lax.while_loop(
            lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, carry[1] + jnp.sum(image)),
            (0, jnp.float32(0.0)),
        )[1]  # fmt: skip
        return jnp.stack([3 * np.sum(GREY) + 1.0, total])

    attack = square(Threat(linf, 0.1), queries=50)
    lead = jax.jit(lambda k: margin(looped(k, attack(k, looped, GREY, 0)), 0))
    assert lead(key) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(queries=1), "queries=1"),
        (dict(queries=5, answers=3), "queries=5"),
        (dict(share=0.0), "share=0.0"),
        (dict(share=1.5), "share=1.5"),
        (dict(answers=0), "answers=0"),
        (dict(restarts=0), "restarts=0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        square(Threat(linf, 0.1), **settings)


def test_other_norms_are_refused():
    with pytest.raises(UsageError, match="norm=l1: the Square attack expects linf or l2"):
        square(Threat(l1, 1.0))
