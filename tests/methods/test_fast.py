"""N-FGSM and GradAlign against their equations in NumPy."""

import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, methods, models
from rain_jax.checks import UsageError
from rain_jax.models.conv import by_lax
from rain_jax.norms import linf
from rain_jax.types import Batch, Threat

THREAT = Threat(linf, 0.05)
FGSM = attacks.fgsm(THREAT)
ROWS = by_hand.ROWS
BATCH = Batch(
    jnp.asarray(np.random.default_rng(0).random((6, 2, 2, 1), np.float32)),
    ROWS.label,
    ROWS.index,
    ROWS.valid,
)
PIXELS = np.asarray(BATCH.image, np.float64).reshape(6, 4)
WEIGHT = {"weight": 3 * np.random.default_rng(1).standard_normal((4, 3))}
ONE_HOT = np.eye(3)[by_hand.LABEL]


def image_slopes(pixels, weight):
    """d CE / dx = W (p - y) for logits x W."""
    return (np.exp(by_hand.log_softmax(pixels @ weight)) - ONE_HOT) @ weight.T


def found_by(objective, key):
    find = jax.jit(lambda params, key: objective.find(params, {}, key, BATCH, None, 0)[0].images)
    return np.asarray(find(by_hand.f32(WEIGHT), key)).reshape(6, 4)


@functools.cache
def noise_of(parts, radius):
    """The noise that each image of the batch is given: by its key, or by the first of so many."""

    @jax.jit
    def draw(key):
        def one(key):
            own = jax.random.split(key, parts)[0] if parts else key
            return linf.sample(own, (2, 2, 1), radius)

        return jax.vmap(one)(jax.vmap(jax.random.fold_in, (None, 0))(key, BATCH.index))

    return lambda key: np.asarray(draw(key), np.float64).reshape(6, 4)


def test_n_fgsm_by_hand(key):
    """Noise in two radii, clipped; one step of a radius from there, clipped, and no ball."""
    noise = noise_of(2, 2 * THREAT.radius)(key)
    noisy = np.clip(PIXELS + noise, 0, 1)
    expected = np.clip(noisy + 0.05 * np.sign(image_slopes(noisy, WEIGHT["weight"])), 0, 1)
    found = found_by(methods.n_fgsm(by_hand.LINEAR, THREAT), key)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    away = np.max(np.abs(found - PIXELS))
    assert THREAT.radius * 1.5 < away <= THREAT.radius * 3 + 1e-6


def test_n_fgsm_without_noise_is_fgsm_training(key):
    found = [
        found_by(objective, key)
        for objective in (
            methods.n_fgsm(by_hand.LINEAR, THREAT, noise=0.0),
            methods.adversarial(by_hand.LINEAR, FGSM),
        )
    ]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_grad_align_by_hand(key):
    """CE(x') + weight (1 - cos), through the second gradient only."""
    far = Threat(linf, 0.8)  # nearby the gradients of a linear model are as good as parallel
    objective = methods.grad_align(by_hand.LINEAR, FGSM, far, weight=20.0)
    params = by_hand.f32(WEIGHT)
    value_and_gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (_, metrics)), gradient = value_and_gradient(params, {}, key, BATCH)
    noise = noise_of(0, far.radius)(jax.random.fold_in(key, 2**30 + 1))
    attacked = found_by(objective, key)
    here = image_slopes(PIXELS, WEIGHT["weight"])  # held fixed

    def cosines(weight):
        there = image_slopes(PIXELS + noise, weight)
        sizes = np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1)
        return np.sum(here * there, 1) / sizes

    def expected(params):
        log_p = by_hand.log_softmax(attacked @ params["weight"])
        losses = -np.sum(ONE_HOT * log_p, 1) + 20 * (1 - cosines(params["weight"]))
        return np.sum(losses[by_hand.VALID])

    np.testing.assert_allclose(loss, expected(WEIGHT), rtol=1e-5)
    slope = by_hand.slopes(expected, WEIGHT)["weight"]
    np.testing.assert_allclose(gradient["weight"], slope, rtol=1e-4, atol=2e-5)
    aligned = np.sum(cosines(WEIGHT["weight"])[by_hand.VALID])
    np.testing.assert_allclose(metrics["alignment"], aligned, rtol=1e-5)
    # The penalty is there to be seen: it is not rounding.
    assert 20 * (5 - aligned) > 0.1


def test_grad_align_of_weight_zero_is_adversarial_training(key):
    params = by_hand.f32(WEIGHT)
    found = [
        jax.jit(jax.value_and_grad(objective, has_aux=True))(params, {}, key, BATCH)
        for objective in (
            methods.grad_align(by_hand.LINEAR, FGSM, THREAT, weight=0.0),
            methods.adversarial(by_hand.LINEAR, FGSM),
        )
    ]
    np.testing.assert_allclose(found[0][0][0], found[1][0][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1]["weight"], found[1][1]["weight"], atol=1e-6)


def test_images_without_a_gradient_pay_nothing(key):
    objective = methods.grad_align(by_hand.LINEAR, FGSM, THREAT)
    flat = {"weight": jnp.zeros((4, 3))}
    (loss, (_, metrics)), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        flat, {}, key, BATCH
    )
    np.testing.assert_allclose(loss, 5 * np.log(3), rtol=1e-6)
    assert metrics["alignment"] == 5
    assert np.all(np.isfinite(gradient["weight"]))


def test_gradients_of_gradients_go_through_the_convolutions(key):
    """The same as by XLA's own rules, and other than without the penalty."""
    network = models.cnn(3, widths=(2,), hidden=4, batch_norm=True, activation="softplus")
    image = np.random.default_rng(0).random((6, 8, 8, 1), np.float32)
    batch = BATCH._replace(image=jnp.asarray(image))
    variables = jax.jit(network.init)(key, batch.image)
    params = variables.pop("params")

    def gradient(weight):
        objective = methods.grad_align(network, FGSM, THREAT, weight=weight, batch_norm="batch")
        gradient_of = jax.jit(jax.grad(lambda p: objective(p, variables, key, batch)[0]))
        return jax.tree.leaves(gradient_of(params))

    ours = gradient(5.0)
    with by_lax():
        theirs = gradient(5.0)
    for a, b, c in zip(ours, theirs, gradient(0.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        if a.ndim > 1:
            assert np.max(np.abs(np.asarray(a) - np.asarray(c))) > 1e-2


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="noise=-1"):
        methods.n_fgsm(by_hand.LINEAR, THREAT, noise=-1)
    with pytest.raises(UsageError, match="step_size=0"):
        methods.n_fgsm(by_hand.LINEAR, THREAT, step_size=0)
    with pytest.raises(UsageError, match="weight=-1"):
        methods.grad_align(by_hand.LINEAR, FGSM, THREAT, weight=-1)
