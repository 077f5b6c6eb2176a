"""Estimators: value, companion and gradient over the same draws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import gradients
from rain_jax.checks import UsageError
from rain_jax.gradients import straight_through

IMAGE = np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(2, 2, 3)


def run(function, *arguments):
    """As one program, into NumPy: by themselves many small steps are compiled each."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def test_exact_is_the_functions_own_gradient(key):
    estimate = gradients.exact()(lambda k, x: (jnp.sum(x**2), x[0, 0, 0]))
    (value, aux), gradient = run(estimate, key, IMAGE)
    np.testing.assert_allclose(value, np.sum(IMAGE**2), rtol=1e-6)
    assert aux == IMAGE[0, 0, 0]
    np.testing.assert_allclose(gradient, 2 * IMAGE, rtol=1e-6)


def test_eot_takes_means_over_the_same_draws(key):
    """F = w x^2 with random w: the mean value and gradient share the mean of those w."""

    def function(key, image):
        weight = jax.random.uniform(key)
        return weight * jnp.sum(image**2), weight

    (value, mean_weight), gradient = run(gradients.eot(7)(function), key, IMAGE)
    weights = run(lambda key: jax.vmap(jax.random.uniform)(jax.random.split(key, 7)), key)
    np.testing.assert_allclose(mean_weight, np.mean(weights), rtol=1e-6)
    np.testing.assert_allclose(value, mean_weight * np.sum(IMAGE**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, mean_weight * 2 * IMAGE, rtol=1e-5)


def test_eot_of_a_fixed_function_is_exact(key):
    def function(key, image):
        return jnp.sum(jnp.sin(image)), jnp.max(image)

    one, many = (run(e(function), key, IMAGE) for e in (gradients.exact(), gradients.eot(5)))
    chex.assert_trees_all_close(one, many, rtol=1e-6)


def test_eot_refuses_no_draws():
    with pytest.raises(UsageError, match=r"draws=0: expected a number in \[1, inf\)"):
        gradients.eot(0)


def test_straight_through_is_hard_forwards_and_identity_backwards():
    rounded = straight_through(lambda x: jnp.round(3 * x) / 3)
    gradient = jax.grad(lambda x: jnp.sum(rounded(x) * IMAGE))
    value, plain, slope = run(lambda x: (rounded(x), jnp.round(3 * x) / 3, gradient(x)), IMAGE)
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_array_equal(slope, IMAGE)


def test_straight_through_with_a_surrogate_and_a_key(key):
    def noisy(key, image):
        return jnp.round(image + 0.1 * jax.random.normal(key, image.shape))

    apply = straight_through(noisy, lambda key, image: image**2)
    gradient = jax.grad(lambda x, key: jnp.sum(apply(key, x)))
    value, plain, slope = run(
        lambda key, x: (apply(key, x), noisy(key, x), gradient(x, key)), key, IMAGE
    )
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_allclose(slope, 2 * IMAGE, rtol=1e-6)


def test_straight_through_chains():
    """The rule of a chain is the chain of the rules."""
    first = straight_through(jnp.round, lambda x: 2 * x)
    second = straight_through(jnp.floor, lambda x: x**3)
    gradient = run(jax.grad(lambda x: jnp.sum(second(first(x)))), IMAGE)
    np.testing.assert_allclose(gradient, 3 * np.round(IMAGE) ** 2 * 2, rtol=1e-6)


def test_straight_through_under_vmap_and_jit():
    rounded = straight_through(jnp.round)
    images = np.stack([IMAGE, 1 - IMAGE])
    gradient = run(jax.vmap(jax.grad(lambda x: jnp.sum(rounded(x) ** 2))), images)
    np.testing.assert_allclose(gradient, 2 * np.round(images), rtol=1e-6)


BOTH_WAYS = pytest.mark.parametrize("name", ["nes", "spsa"])


@BOTH_WAYS
def test_estimates_are_the_gradient_of_a_plane_within_their_sampling_error(name, key):
    """One draw of direction x slope has variance |g|^2 +- g_i^2: plus for normal ones, minus signs.

    So over many draws each error, in units of its standard deviation, is a standard normal number.
    """
    slope = np.random.default_rng(1).normal(size=IMAGE.shape).astype(np.float32)
    draws = 20_000
    estimate = getattr(gradients, name)(draws, 0.5)(lambda k, x: (jnp.sum(slope * x), 0.0))
    _, gradient = run(estimate, key, IMAGE)
    square = np.sum(slope**2) + (slope**2 if name == "nes" else -(slope**2))
    errors = (gradient - slope) / np.sqrt(square / draws)
    assert np.max(np.abs(errors)) < 4
    assert 0.3 < np.sqrt(np.mean(errors**2)) < 1.8  # 12 of them


@BOTH_WAYS
def test_what_bends_evenly_cancels(name, key):
    """Both ways differ by the slope alone: a parabola's estimate is that of its tangent."""
    estimator = getattr(gradients, name)(3, 0.1)

    @jax.jit
    def estimated(key, image, parabola):
        tangent = lambda x: jnp.sum(2 * IMAGE * x)
        value = lambda k, x: (jnp.where(parabola, jnp.sum(x**2), tangent(x)), 0.0)
        return estimator(value)(key, image)[1]

    bent, flat = (estimated(key, IMAGE, parabola) for parabola in (True, False))
    np.testing.assert_allclose(bent, flat, rtol=1e-3, atol=1e-4)


@BOTH_WAYS
def test_value_and_aux_are_the_images_own(name, key):
    def function(key, image):
        return jnp.sum(jnp.sin(9 * image)), (image, jnp.max(image))

    estimate = getattr(gradients, name)(2, 0.5)(function)
    (told, _), expected = run(lambda *given: (estimate(*given), function(*given)), key, IMAGE)
    chex.assert_trees_all_equal(told, expected)


@BOTH_WAYS
def test_every_query_has_a_key_of_its_own_which_no_direction_shares(name, key):
    asked = []

    def function(key, image):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda *query: asked.append(query), data, image)
        noise = jax.random.uniform(key)
        return noise, noise

    (value, aux), _ = run(getattr(gradients, name)(5, 0.1, answers=4)(function), key, IMAGE)
    jax.effects_barrier()
    assert len(asked) == 2 * 5 + 4
    assert len({tuple(np.asarray(data).tolist()) for data, _ in asked}) == 2 * 5 + 4
    at_image = [data for data, image in asked if np.array_equal(image, IMAGE)]
    assert len(at_image) == 4
    keyed = lambda of: jax.jit(lambda data: of(jax.random.wrap_key_data(data)))
    uniform = keyed(jax.random.uniform)
    draws = [uniform(data) for data in at_image]
    np.testing.assert_allclose(value, np.mean(draws), rtol=1e-6)
    assert value == aux
    sample = {"nes": jax.random.normal, "spsa": jax.random.rademacher}[name]
    sampled = keyed(lambda key: sample(key, IMAGE.shape, jnp.float32))
    for data, image in asked:
        assert np.max(np.abs(np.abs(image - IMAGE) - 0.1 * np.asarray(sampled(data)))) > 1e-3


@BOTH_WAYS
@pytest.mark.parametrize("setting", ["draws", "scale", "answers"])
def test_estimates_refuse_nothing_to_go_by(name, setting):
    with pytest.raises(UsageError, match=f"{setting}=0"):
        getattr(gradients, name)(**{setting: 0})
