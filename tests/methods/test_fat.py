"""Friendly adversarial training: its adversary against a plain loop, and the schedule of tau."""

import functools

import by_hand
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, methods
from rain_jax.checks import UsageError
from rain_jax.losses import cross_entropy
from rain_jax.methods.fat import friendly
from rain_jax.norms import linf, random_start
from rain_jax.types import Batch, Threat

SHAPE, COUNT = (3, 3, 1), 48
THREAT = Threat(linf, 0.2)
SIZES = dict(steps=6, step_size=0.05)
DRAW = np.random.default_rng(1)
IMAGES = DRAW.random((COUNT, *SHAPE), np.float32)
WEIGHTS = DRAW.normal(size=(2, 9, 3)).astype(np.float32)
KEYS = drawn.keys(3, COUNT)


def logits_fn(key, image):
    """A small curved classifier, its sums written out so that batches round alike."""
    flat = image.reshape(-1, 1)
    return 2 * jnp.tanh(jnp.sum(flat * WEIGHTS[0], 0)) + jnp.sum(flat**2 * WEIGHTS[1], 0)


all_logits = jax.jit(jax.vmap(lambda image: logits_fn(None, image)))
LABELS = np.argmax(all_logits(IMAGES), -1)


@functools.cache
def run(patience, noise=0.0):
    one = functools.partial(friendly, THREAT, **SIZES, patience=patience, noise=noise)
    many = jax.jit(jax.vmap(lambda key, image, label: one(key, logits_fn, image, label)))
    return np.asarray(many(KEYS, IMAGES, LABELS))


@jax.jit
def draws():
    """Of each image: where it begins, and the noise of each step."""

    def one(key, image):
        start_key, _, noise_key = jax.random.split(key, 3)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_key, jnp.arange(SIZES["steps"]))
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        return random_start(THREAT, start_key, image), noise

    return jax.vmap(one)(KEYS, IMAGES)


@jax.jit
def logits_and_slope(image, label):
    return logits_fn(None, image), jax.grad(lambda x: cross_entropy(logits_fn(None, x), label))(
        image
    )


def plain_loop(patience, noise):
    """The authors' control flow, one image at a time: those that are done leave the loop."""
    found, left_early = [], 0
    for start, draw, image, label in zip(*draws(), IMAGES, LABELS, strict=True):
        now, control, draw = np.asarray(start), patience, np.asarray(draw)
        for number in range(SIZES["steps"]):
            logits, slope = map(np.asarray, logits_and_slope(now, label))
            if np.argmax(logits) != label:
                if control == 0:
                    left_early += 1
                    break
                control -= 1
            now = now + np.float32(SIZES["step_size"]) * np.sign(slope) + noise * draw[number]
            now = np.clip(image + np.clip(now - image, -THREAT.radius, THREAT.radius), 0, 1)
            now = now.astype(np.float32)
        found.append(now)
    return np.stack(found), left_early


@pytest.mark.parametrize(("patience", "noise"), [(0, 0.0), (1, 0.0), (2, 0.01)])
def test_it_is_the_authors_loop(patience, noise):
    expected, left_early = plain_loop(patience, noise)
    np.testing.assert_allclose(run(patience, noise), expected, atol=1e-6)
    assert 0 < left_early < COUNT


def test_with_all_patience_it_is_pgd():
    attack = attacks.pgd(THREAT, **SIZES, keep="last")
    expected = jax.jit(jax.vmap(lambda k, x, y: attack(k, logits_fn, x, y)))(KEYS, IMAGES, LABELS)
    np.testing.assert_array_equal(run(SIZES["steps"]), expected)
    assert np.any(run(0) != expected)


def test_friends_are_less_wrong_than_enemies():
    """And wrong all the same: the point beyond the boundary is kept."""
    logits = [np.float64(all_logits(run(patience))) for patience in (0, 6)]
    first, second = (np.argmax(one, -1) != LABELS for one in logits)
    assert np.sum(first & second) > 5
    loss = [
        -by_hand.log_softmax(one)[np.arange(COUNT), LABELS][first & second].mean() for one in logits
    ]
    assert loss[0] < loss[1]


def test_keeps_to_the_threat_with_noise_of_any_size():
    found = run(2, 0.3)
    assert np.all((found >= 0) & (found <= 1))
    assert np.max(np.abs(found - IMAGES)) <= THREAT.radius + 1e-6


def test_patience_grows_at_the_milestones(key):
    draw = np.random.default_rng(4)
    image = jnp.asarray(draw.random((6, 2, 2, 1), np.float32))
    batch = Batch(image, by_hand.ROWS.label, by_hand.ROWS.index, by_hand.ROWS.valid)
    params = {"weight": jnp.asarray(6 * draw.normal(size=(4, 3)), jnp.float32)}
    objective = methods.fat(
        by_hand.LINEAR, THREAT, **SIZES, noise=0.0, patience=(0, 2, 6), milestones=(1.5, 3),
        steps_per_epoch=5,
    )  # fmt: skip
    find = jax.jit(lambda step: objective.find(params, {}, key, batch, None, step)[0].images)

    @functools.cache
    def expected(patience):
        def one(index, image, label):
            return friendly(
                THREAT, jax.random.fold_in(key, index),
                lambda key, x: jnp.matmul(x.reshape(4), params["weight"], precision="highest"),
                image, label, **SIZES, patience=patience, noise=0.0,
            )  # fmt: skip

        return np.asarray(jax.jit(jax.vmap(one))(batch.index, image, batch.label))

    begun = {0: 0, 7: 0, 8: 2, 14: 2, 15: 6, 100: 6}
    for step, patience in begun.items():
        np.testing.assert_allclose(find(jnp.int32(step)), expected(patience), atol=1e-6)
    assert np.any(expected(0) != expected(2))
    assert np.any(expected(2) != expected(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patience=(0, 1)), "expected 3 numbers"),
        (dict(patience=(0, -1, 2)), "patience="),
        (dict(milestones=(90.0, 50.0)), "rising epochs"),
        (dict(milestones=("50", "90")), "milestones="),
        (dict(steps=0), "steps=0"),
        (dict(step_size=0.0), "step_size="),
        (dict(noise=-0.1), "noise="),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        methods.fat(by_hand.LINEAR, THREAT, **options)
