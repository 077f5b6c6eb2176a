"""Auto-PGD against answers that can be derived, and against the paper's loop written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.attacks import apgd, apgd_t, pgd
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import cross_entropy, dlr, dlr_targeted, margin
from rain_jax.norms import l2, linf
from rain_jax.types import Threat

IMAGE = jnp.full((6, 6, 2), 0.5)
WEIGHT = jax.random.normal(jax.random.key(1), (6, 6, 2))
WEIGHTS = jax.random.normal(jax.random.key(2), (72, 5))


def plane(key, image):
    return jnp.stack([3.0, jnp.sum(WEIGHT * (image - 0.5)), -5.0])


def curved(key, image):
    """Five classes with many bends: step sizes must shrink to climb it."""
    flat = image.ravel()
    return jnp.sin(4 * flat @ WEIGHTS) * 3 + jnp.cos(9 * flat) @ WEIGHTS


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("norm", "radius"), [(linf, 0.1), (l2, 0.4)], ids=["linf", "l2"])
def test_reaches_the_optimum_on_a_plane(norm, radius, loss, key):
    found = apgd(Threat(norm, radius), steps=50, loss=loss)(key, plane, IMAGE, 0)
    dual = jnp.sum(jnp.abs(WEIGHT)) if norm is linf else jnp.sqrt(jnp.sum(WEIGHT**2))
    reached = float(jnp.sum(WEIGHT * (found - 0.5)) / (radius * dual))
    assert 0.99 <= reached <= 1 + 1e-4


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


@pytest.mark.parametrize(("norm", "radius"), [(linf, 0.1), (l2, 0.4)], ids=["linf", "l2"])
def test_follows_the_published_loop(norm, radius, key):
    """Point by point while rounding allows it, and to the same loss in the end."""
    steps = 40
    attack = apgd(Threat(norm, radius), steps=steps)
    state = attack.init(key, curved, IMAGE, 2)
    value = jax.jit(lambda x: cross_entropy(curved(key, x), 2))
    gradient = jax.jit(jax.grad(lambda x: cross_entropy(curved(key, x), 2)))
    trail, best_value = published(
        "linf" if norm is linf else "l2", radius, steps, np.asarray(state.image, np.float64),
        lambda x: float(value(jnp.asarray(x, jnp.float32))),
        lambda x: np.asarray(gradient(jnp.asarray(x, jnp.float32)), np.float64),
    )  # fmt: skip
    step = jax.jit(lambda state: attack.step(curved, state))
    for number in range(8):
        state = step(state)
        np.testing.assert_allclose(state.image, trail[number], atol=1e-4)
    for _ in range(8, steps):
        state = step(state)
    np.testing.assert_allclose(state.top_loss, best_value, rtol=0.05)
    assert float(state.size) < 2 * radius / 2


def test_climbs_higher_than_fixed_steps(key):
    """With the same number of gradients, on average over images."""
    threat = Threat(linf, 0.15)
    images = jax.random.uniform(key, (32, 6, 6, 2))
    labels = jax.vmap(lambda x: jnp.argmax(curved(key, x)))(images)
    keys = jax.random.split(key, 32)

    def reached(attack):
        run = jax.jit(jax.vmap(lambda k, x, y: attack(k, curved, x, y)))
        found = run(keys, images, labels)
        return float(jnp.mean(jax.vmap(lambda x, y: margin(curved(key, x), y))(found, labels)))

    fixed = pgd(threat, steps=40, loss=margin)
    assert reached(apgd(threat, steps=40, loss=margin)) >= reached(fixed)


def test_targets_are_the_likeliest_wrong_classes_and_each_is_tried(key):
    attack = apgd_t(Threat(linf, 0.3), steps=10, targets=3)
    state = attack.init(key, curved, IMAGE, 2)
    logits = np.array(curved(key, IMAGE))
    logits[2] = -np.inf
    np.testing.assert_array_equal(state.aim, np.argsort(-logits)[:3])


@pytest.mark.parametrize(("classes", "tried"), [(2, 1), (3, 2), (5, 4)])
def test_fewer_classes_than_targets(classes, tried, key):
    def logits_fn(key, image):
        return image.ravel() @ WEIGHTS[:, :classes]

    attack = apgd_t(Threat(linf, 0.3), steps=5)
    state = attack.init(key, logits_fn, IMAGE, 0)
    assert state.aim.shape == (tried,)
    assert 0 not in np.asarray(state.aim)
    found = attack(key, logits_fn, IMAGE, 0)
    assert margin(logits_fn(key, found), 0) > 0


def test_the_targeted_loss_overtakes_the_label(key):
    """Towards one class alone, on a linear model, no worse than the corner of the ball there."""

    def logits_fn(key, image):
        return (image - 0.5).ravel() @ WEIGHTS

    attack = apgd_t(Threat(linf, 0.05), steps=50, targets=1)
    state = attack.init(key, logits_fn, IMAGE, 0)
    aim = int(state.aim[0])
    corner = 0.5 + 0.05 * jnp.sign(WEIGHTS[:, aim] - WEIGHTS[:, 0]).reshape(IMAGE.shape)
    for _ in range(50):
        state = attack.step(logits_fn, state)
    # The loss is the lead over a spread, so its best point is near that corner or better.
    assert state.top_loss[0] >= dlr_targeted(logits_fn(key, corner), 0, aim) - 1e-3
    found, score = attack.best(logits_fn, state)
    assert score > 0
    assert margin(logits_fn(key, found), 0) == score


def test_random_models_are_climbed_by_their_mean(key):
    def noisy(key, image):
        noise = 6 * jax.random.normal(key, WEIGHT.shape)
        return jnp.stack([0.0, jnp.sum((WEIGHT + noise) * (image - 0.5)), -9.0])

    reached = {}
    for draws in (1, 64):
        attack = apgd(Threat(linf, 0.1), steps=20, estimator=eot(draws), loss=margin)
        found = jax.jit(lambda k, attack=attack: attack(k, noisy, IMAGE, 0))(key)
        reached[draws] = float(jnp.sum(WEIGHT * (found - 0.5)))
    assert reached[64] > reached[1]


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="steps=0"):
        apgd(Threat(linf, 0.1), steps=0)
    with pytest.raises(UsageError, match="targets=0"):
        apgd_t(Threat(linf, 0.1), targets=0)
