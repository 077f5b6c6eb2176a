"""Gradient ascent against answers that can be derived, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rain_jax.attacks import fgsm, mi_fgsm, pgd
from rain_jax.attacks.pgd import ascent
from rain_jax.checks import UsageError
from rain_jax.gradients import eot
from rain_jax.losses import cross_entropy, dlr, margin, targeted
from rain_jax.norms import l1, l2, linf, steepest
from rain_jax.types import Threat

IMAGE = jnp.full((8, 8, 3), 0.5)
WEIGHT = jax.random.normal(jax.random.key(1), (8, 8, 3))


def plane(key, image):
    """Two classes on the sides of a plane; class 0 is right at IMAGE."""
    return jnp.stack([3.0, jnp.sum(WEIGHT * (image - 0.5))])


def best_value(norm, radius):
    dual = {id(linf): jnp.sum(jnp.abs(WEIGHT)), id(l2): jnp.sqrt(jnp.sum(WEIGHT**2)),
            id(l1): jnp.max(jnp.abs(WEIGHT))}[id(norm)]  # fmt: skip
    return radius * float(dual)


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("norm", "radius"), [(linf, 0.1), (l2, 0.45), (l1, 0.45)], ids=["linf", "l2", "l1"]
)
def test_reaches_the_optimum_on_a_plane(norm, radius, loss, key):
    # In L2 a start across the sphere comes round only as the steps add up to several radii.
    attack = pgd(Threat(norm, radius), steps=60, step_size=radius / 10, loss=loss)
    found = attack(key, plane, IMAGE, 0)
    reached = float(jnp.sum(WEIGHT * (found - 0.5)))
    assert reached >= 0.99 * best_value(norm, radius)
    assert reached <= best_value(norm, radius) * (1 + 1e-4)


def test_linf_reaches_the_corner_of_the_cube(key):
    found = pgd(Threat(linf, 0.1), steps=10, step_size=0.05)(key, plane, IMAGE, 0)
    np.testing.assert_allclose(found, 0.5 + 0.1 * jnp.sign(WEIGHT), atol=1e-6)


def test_fgsm_is_the_sign_of_the_gradient(key):
    found = fgsm(Threat(linf, 0.1))(key, plane, IMAGE, 0)
    np.testing.assert_allclose(found, 0.5 + 0.1 * jnp.sign(WEIGHT), atol=1e-6)


def test_momentum_reaches_the_corner_too(key):
    found = mi_fgsm(Threat(linf, 0.1), steps=10)(key, plane, IMAGE, 0)
    np.testing.assert_allclose(found, 0.5 + 0.1 * jnp.sign(WEIGHT), atol=1e-6)


def test_any_optax_transformation_can_climb(key):
    climb = optax.chain(optax.scale_by_adam(), optax.scale(0.03))
    found = ascent(Threat(linf, 0.1), climb, steps=20)(key, plane, IMAGE, 0)
    np.testing.assert_allclose(found, 0.5 + 0.1 * jnp.sign(WEIGHT), atol=1e-6)


def test_keeps_the_best_and_not_the_last(key):
    """A step that overshoots a narrow peak: the last image is worse than one before it."""

    def peak(key, image):
        distance = jnp.mean(image) - 0.5
        return jnp.stack([0.0, 1.0 - 40 * jnp.abs(distance - 0.03)])

    climb = optax.chain(steepest(linf), optax.scale(0.04))
    threat = Threat(linf, 0.1)
    runs = {
        keep: ascent(threat, climb, steps=6, keep=keep, start="clean", loss=margin)
        for keep in ("best", "last")
    }
    reached = {
        keep: float(margin(peak(key, run(key, peak, IMAGE, 0)), 0)) for keep, run in runs.items()
    }
    assert reached["best"] >= reached["last"]
    assert reached["best"] > 0.55


def test_restarts_return_the_best_run(key):
    """Many local peaks: with more restarts the margin reached cannot fall."""

    def bumps(key, image):
        return jnp.stack([0.0, jnp.sum(jnp.sin(60 * image))])

    threat = Threat(linf, 0.2)
    values = []
    for restarts in (1, 8):
        found = pgd(threat, steps=5, restarts=restarts)(key, bumps, IMAGE, 0)
        values.append(float(bumps(key, found)[1]))
    alone = [
        float(bumps(key, pgd(threat, steps=5)(k, bumps, IMAGE, 0))[1])
        for k in jax.random.split(key, 8)
    ]
    np.testing.assert_allclose(values[1], max(alone), rtol=1e-4)


def test_targeted_loss_moves_towards_the_target(key):
    weights = jax.random.normal(jax.random.key(4), (192, 5))

    def logits_fn(key, image):
        return image.ravel() @ weights

    attack = pgd(Threat(linf, 0.2), steps=20, loss=targeted(cross_entropy), keep="last")
    for target in range(5):
        assert int(jnp.argmax(logits_fn(key, attack(key, logits_fn, IMAGE, target)))) == target


def test_eot_finds_the_mean_direction_of_a_random_model(key):
    """Signs of random noise outweigh the signal in one draw; the mean over draws finds it."""

    def noisy(key, image):
        noise = 6 * jax.random.normal(key, WEIGHT.shape)
        return jnp.stack([0.0, jnp.sum((WEIGHT + noise) * (image - 0.5))])

    threat = Threat(linf, 0.1)
    reached = {}
    for draws in (1, 64):
        attack = pgd(threat, steps=20, estimator=eot(draws), loss=margin)
        found = jax.jit(lambda k, attack=attack: attack(k, noisy, IMAGE, 0))(key)
        reached[draws] = float(jnp.sum(WEIGHT * (found - 0.5)))
    assert reached[64] > 1.5 * reached[1]


def test_a_scan_and_not_an_unrolled_loop():
    """Compile time must not grow with the steps."""

    def size(steps):
        attack = pgd(Threat(linf, 0.1), steps=steps)
        return len(str(jax.make_jaxpr(lambda k: attack(k, plane, IMAGE, 0))(jax.random.key(0))))

    assert size(100) < size(3) * 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=5, step_size=-0.1), "step_size=-0.1"),
        (dict(steps=5, restarts=0), "restarts=0"),
        (dict(steps=5, start="clear"), "did you mean 'clean'"),
        (dict(steps=5, keep="lsat"), "did you mean 'last'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        pgd(Threat(linf, 0.1), **settings)
