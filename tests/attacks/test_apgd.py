"""Auto-PGD against answers that can be derived, and against the paper's loop written out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pgd import BALLS, BOUNDED, UNEVEN, WEIGHT, answer, climbed, optimum, share_at_the_kink

from rain_jax.attacks import apgd, apgd_t, pgd
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import cross_entropy, dlr, dlr_targeted, kl, margin
from rain_jax.norms import allowed, l1, l2, linf
from rain_jax.types import Threat

DRAW = np.random.default_rng(2)
SHAPE = (6, 6, 2)
IMAGE = np.full(SHAPE, 0.5, np.float32)
WEIGHTS = DRAW.normal(size=(72, 5)).astype(np.float32)


def curved(key, image):
    """Five classes with many bends: step sizes must shrink to climb it."""
    flat = image.ravel()
    return jnp.sin(4 * flat @ WEIGHTS) * 3 + jnp.cos(9 * flat) @ WEIGHTS


@functools.cache
def entropy():
    """The cross-entropy of `curved` for label 2, and its gradient, on images of any precision."""
    program = jax.jit(jax.value_and_grad(lambda x: cross_entropy(curved(None, x), 2)))
    both = lambda x: program(np.asarray(x, np.float32))
    return lambda x: float(both(x)[0]), lambda x: np.array(both(x)[1], np.float64)


def driven(attack, model, key, image=IMAGE, label=2):
    """The first state, and those after each step with the answer and its score there."""

    @jax.jit
    def run(key, image):
        def step(state, _):
            state = attack.step(model, state)
            return state, (state, attack.best(model, state))

        begin = attack.init(key, model, image, label)
        first = attack.best(model, begin)
        return (begin, first), jax.lax.scan(step, begin, length=attack.steps)[1]

    return run(key, image)


def fifty(threat):
    return apgd(threat, steps=50)


@BALLS
def test_reaches_the_optimum_on_a_plane(norm, radius, key):
    reached = climbed(fifty, norm, radius, key) / optimum(norm, radius, WEIGHT, UNEVEN)
    assert 0.99 <= reached <= 1 + 1e-4


@pytest.mark.parametrize("loss", [margin, dlr], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("norm", "radius"), [(linf, 0.1), (l1, 4.0)], ids=["linf", "l1"])
def test_whatever_the_loss(norm, radius, loss, key):
    maker = lambda threat: apgd(threat, steps=50, loss=loss)
    reached = climbed(maker, norm, radius, key) / optimum(norm, radius, WEIGHT, UNEVEN)
    assert 0.99 <= reached <= 1 + 1e-4


@BOUNDED
def test_turns_at_the_kink_of_two_planes(norm, radius, key):
    """The larger of two planes: the way up the first leads onto the second, which is steeper."""
    assert 0.99 <= share_at_the_kink(fifty, norm, radius, key) <= 1 + 1e-4


def published(norm, radius, steps, start, value, gradient):
    """Algorithm 1 of arXiv:2003.01690 with its windows counted in whole steps, for one image."""
    image = np.full((6, 6, 2), 0.5)

    def project(z):
        change = z - image
        if norm == "linf":
            change = np.clip(change, -radius, radius)
        else:
            change = change * min(1.0, radius / max(np.linalg.norm(change), 1e-12))
        return np.clip(image + change, 0, 1)

    def unit(g):
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    size, before, x = 2 * radius, start, start
    best, best_value = start, value(start)
    values, window, since = [best_value], max(int(0.22 * steps), 1), 0
    halved, value_then = True, best_value
    trail = []
    for number in range(steps):
        weight = 1.0 if number == 0 else 0.75
        ahead = project(x + size * unit(gradient(x)))
        x, before = project(x + weight * (ahead - x) + (1 - weight) * (x - before)), x
        values.append(value(x))
        if values[-1] > best_value:
            best, best_value = x, values[-1]
        since += 1
        if since == window:
            recent = values[-window - 1 :]
            rises = sum(after > before_ for before_, after in itertools.pairwise(recent))
            halve = rises <= 0.75 * window or (not halved and value_then >= best_value)
            halved, value_then = halve, best_value
            if halve:
                size, x = size / 2, best
            window, since = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
        trail.append(x)
    return trail, best_value


# A start from which no step is so nearly a halved one that rounding decides.
START = jax.random.key(4)


@pytest.mark.parametrize(("norm", "radius"), [(linf, 0.1), (l2, 0.4)], ids=["linf", "l2"])
def test_follows_the_published_loop(norm, radius):
    """Point by point while rounding allows it, and to the same loss in the end."""
    steps = 40
    attack = apgd(Threat(norm, radius), steps=steps)
    (begin, _), (states, _) = driven(attack, curved, START)
    trail, best_value = published(
        "linf" if norm is linf else "l2", radius, steps, np.asarray(begin.image, np.float64),
        *entropy(),
    )  # fmt: skip
    np.testing.assert_allclose(states.image[:8], trail[:8], atol=1e-4)
    np.testing.assert_allclose(states.top.loss[-1], best_value, rtol=0.05)
    assert float(states.pace.size[-1]) < 2 * radius / 2


def published_l1(radius, steps, start, value, gradient):
    """L1-APGD of arXiv:2103.01208 in three shrinking balls, for one image."""
    image = np.asarray(DARK, np.float64)

    def project(z, radius):
        change = z - image
        low, high = 0.0, np.max(np.abs(change))

        def cut(threshold):
            shrunk = np.sign(change) * np.maximum(np.abs(change) - threshold, 0)
            return np.clip(shrunk, -image, 1 - image)

        if np.sum(np.abs(cut(0.0))) <= radius:
            return image + cut(0.0)
        for _ in range(60):
            middle = (low + high) / 2
            fits = np.sum(np.abs(cut(middle))) <= radius
            low, high = (low, middle) if fits else (middle, high)
        return image + cut(high)

    trail, best = [], start
    first = second = 3 * steps // 10
    for factor, length in ((3, first), (2, second), (1, steps - first - second)):
        ball = factor * radius
        x = best = project(best, ball)
        best_value, size = value(x), ball
        trail.append(x)
        changed, window, since = np.sum(x != image), max(int(0.04 * length), 1), 0
        for _ in range(length):
            g = gradient(x)
            g[((g > 0) & (x >= 1)) | ((g < 0) & (x <= 0))] = 0
            some = np.argsort(-np.abs(g).ravel())[: max(round(changed / 1.5), 1)]
            step = np.zeros(g.size)
            step[some] = np.sign(g.ravel()[some]) / np.sum(g.ravel()[some] != 0)
            x = project(x + size * step.reshape(g.shape), ball)
            if value(x) > best_value:
                best, best_value = x, value(x)
            since += 1
            if since == window:
                before, changed, since = changed, np.sum(best != image), 0
                if changed < 0.95 * before:
                    x, size = best, ball
                else:
                    size = max(size / 1.5, ball / 10)
            trail.append(x)
    return trail, best_value


# A third of its pixels are black: they can only be brightened.
DARK = DRAW.random(SHAPE, np.float32)
DARK[:2] = 0.0


@pytest.mark.parametrize("steps", [20, 200])
def test_follows_the_published_loop_in_l1(steps):
    """Point by point while rounding allows it, and to the same loss in the end."""
    attack = apgd(Threat(l1, 1.5), steps=steps)
    (begin, _), (states, _) = driven(attack, curved, START, DARK)
    trail, best_value = published_l1(
        1.5, steps, np.asarray(begin.image, np.float64), *entropy()
    )  # fmt: skip
    assert len(trail) == attack.steps + 1
    np.testing.assert_allclose(states.image[:25], trail[1:26], atol=1e-4)
    np.testing.assert_allclose(states.top.loss[-1], best_value, rtol=0.05)


@pytest.mark.parametrize(
    ("norm", "radius"), [(linf, 0.15), (l2, 0.6), (l1, 1.5)], ids=["linf", "l2", "l1"]
)
def test_climbs_higher_than_fixed_steps(norm, radius, key):
    """With the same number of gradients, on average over images."""
    threat = Threat(norm, radius)
    images = np.random.default_rng(0).random((512, *SHAPE), np.float32)

    def reached(attack):
        def one(key, image):
            label = jnp.argmax(curved(key, image))
            return margin(curved(key, attack(key, curved, image, label)), label)

        return np.mean(jax.jit(jax.vmap(one))(jax.random.split(key, 512), images))

    attack = apgd(threat, steps=40, loss=margin)
    fixed = pgd(threat, steps=attack.steps, loss=margin)
    assert reached(attack) > reached(fixed)


def test_targets_are_the_likeliest_wrong_classes_and_each_is_tried(key):
    attack = apgd_t(Threat(linf, 0.3), steps=10, targets=3)

    @jax.jit
    def aims(key):
        return attack.init(key, curved, IMAGE, 2).against[1], curved(key, IMAGE)

    found, logits = map(np.array, aims(key))
    logits[2] = -np.inf
    np.testing.assert_array_equal(found, np.argsort(-logits)[:3])


@pytest.mark.filterwarnings("ignore:dlr")  # with two classes it says what it becomes
@pytest.mark.parametrize(("classes", "tried"), [(2, 1), (3, 2), (5, 4)])
def test_fewer_classes_than_targets(classes, tried, key):
    def logits_fn(key, image):
        return image.ravel() @ WEIGHTS[:, :classes]

    attack = apgd_t(Threat(linf, 0.3), steps=5)
    (begin, _), (_, (found, _)) = driven(attack, logits_fn, key, label=0)
    assert begin.against[1].shape == (tried,)
    assert 0 not in np.asarray(begin.against[1])
    right, *wrong = np.asarray(found[-1]).ravel() @ WEIGHTS[:, :classes]
    assert max(wrong) > right


def test_the_targeted_loss_overtakes_the_label(key):
    """Towards one class alone, on a linear model, no worse than the corner of the ball there."""

    def logits_fn(key, image):
        return (image - 0.5).ravel() @ WEIGHTS

    attack = apgd_t(Threat(linf, 0.05), steps=50, targets=1)
    (begin, _), (states, (found, score)) = driven(attack, logits_fn, key, label=0)
    aim = int(begin.against[1][0])
    corner = 0.5 + 0.05 * np.sign(WEIGHTS[:, aim] - WEIGHTS[:, 0]).reshape(IMAGE.shape)
    # The loss is the lead over a spread, so its best point is near that corner or better.
    loss = jax.jit(lambda x: dlr_targeted(logits_fn(key, x), 0, aim))
    assert states.top.loss[-1, 0] >= loss(corner) - 1e-3
    found, score = np.asarray(found)[-1], np.asarray(score)[-1]
    assert score > 0
    np.testing.assert_allclose(
        jax.jit(lambda x: margin(logits_fn(key, x), 0))(found), score, rtol=1e-6
    )


def test_in_l1_only_images_in_the_threat_count(key):
    """While the ball is larger there is no answer yet, though the model is broken there."""
    threat = Threat(l1, 2.0)
    attack = apgd(threat, steps=10)

    @jax.jit
    def told(key):
        def tell(state):
            found, score = attack.best(curved, state)
            kept = allowed(threat, IMAGE, found)
            inside = allowed(threat, IMAGE, state.image)
            return inside, kept, score, margin(curved(key, found), 2)

        def step(state, _):
            return attack.step(curved, state), tell(state)

        return jax.lax.scan(step, attack.init(key, curved, IMAGE, 2), length=attack.steps)[1]

    inside, kept, score, margins = map(np.asarray, told(key))
    assert kept.all()
    np.testing.assert_allclose(score, np.where(inside, margins, -np.inf), rtol=1e-6)
    # Three steps in each of the larger balls, and the points that they start at.
    assert inside.tolist() == [False] * 8 + [True] * 4


@pytest.mark.parametrize(("steps", "norm", "whole"), [(7, l2, 7), (7, l1, 9), (1, l1, 3)])
def test_length(steps, norm, whole, key):
    attack = apgd(Threat(norm, 0.5), steps=steps)
    assert attack.steps == whole
    found, _ = answer(attack, curved, key, IMAGE, 2)
    assert jax.jit(lambda x: allowed(Threat(norm, 0.5), IMAGE, x))(found)


def test_kl_compares_with_the_clean_prediction(key):
    attack = apgd(Threat(linf, 0.1), steps=20, loss=kl)
    (begin, _), (states, _) = driven(attack, curved, key)
    logits = jax.jit(lambda x: curved(key, x))
    clean = logits(IMAGE)
    np.testing.assert_array_equal(begin.against, clean)
    image, loss = np.asarray(states.top.image)[-1], np.asarray(states.top.loss)[-1]
    np.testing.assert_allclose(loss, jax.jit(kl)(logits(image), clean), rtol=1e-6)
    assert loss > 10


def test_random_models_are_climbed_by_their_mean(key):
    slope = WEIGHTS[:, 0].reshape(IMAGE.shape)

    def noisy(key, image):
        noise = 6 * jax.random.normal(key, slope.shape)
        return jnp.stack([0.0, jnp.sum((slope + noise) * (image - 0.5)), -9.0])

    reached = {}
    for draws in (1, 64):
        attack = apgd(Threat(linf, 0.1), steps=20, estimator=eot(draws), loss=margin)
        found, _ = answer(attack, noisy, key, IMAGE)
        reached[draws] = np.sum(slope * (found - 0.5))
    assert reached[64] > reached[1]


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="steps=0"):
        apgd(Threat(linf, 0.1), steps=0)
    with pytest.raises(UsageError, match="targets=0"):
        apgd_t(Threat(linf, 0.1), targets=0)
    with pytest.raises(UsageError, match="steps=0"):
        apgd_t(Threat(linf, 0.1), steps=0)
