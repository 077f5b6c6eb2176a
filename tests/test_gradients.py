"""Estimators: value, companion and gradient over the same draws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import gradients
from rain_jax.checks import UsageError
from rain_jax.gradients import straight_through

IMAGE = jnp.linspace(0.1, 0.9, 12).reshape(2, 2, 3)


def test_exact_is_the_functions_own_gradient(key):
    (value, aux), gradient = gradients.exact()(lambda k, x: (jnp.sum(x**2), x[0, 0, 0]))(key, IMAGE)
    np.testing.assert_allclose(value, jnp.sum(IMAGE**2), rtol=1e-6)
    assert aux == IMAGE[0, 0, 0]
    np.testing.assert_allclose(gradient, 2 * IMAGE, rtol=1e-6)


def test_eot_takes_means_over_the_same_draws(key):
    """F = w x^2 with random w: the mean value and gradient share the mean of those w."""

    def function(key, image):
        weight = jax.random.uniform(key)
        return weight * jnp.sum(image**2), weight

    (value, mean_weight), gradient = gradients.eot(7)(function)(key, IMAGE)
    weights = jax.vmap(jax.random.uniform)(jax.random.split(key, 7))
    np.testing.assert_allclose(mean_weight, jnp.mean(weights), rtol=1e-6)
    np.testing.assert_allclose(value, mean_weight * jnp.sum(IMAGE**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, mean_weight * 2 * IMAGE, rtol=1e-5)


def test_eot_of_a_fixed_function_is_exact(key):
    def function(key, image):
        return jnp.sum(jnp.sin(image)), jnp.max(image)

    one, many = gradients.exact()(function)(key, IMAGE), gradients.eot(5)(function)(key, IMAGE)
    chex.assert_trees_all_close(one, many, rtol=1e-6)


def test_eot_refuses_no_draws():
    with pytest.raises(UsageError, match=r"draws=0: expected a number in \[1, inf\)"):
        gradients.eot(0)


def test_straight_through_is_hard_forwards_and_identity_backwards():
    rounded = straight_through(lambda x: jnp.round(3 * x) / 3)
    np.testing.assert_array_equal(rounded(IMAGE), jnp.round(3 * IMAGE) / 3)
    gradient = jax.grad(lambda x: jnp.sum(rounded(x) * IMAGE))(IMAGE)
    np.testing.assert_array_equal(gradient, IMAGE)


def test_straight_through_with_a_surrogate_and_a_key(key):
    def noisy(key, image):
        return jnp.round(image + 0.1 * jax.random.normal(key, image.shape))

    apply = straight_through(noisy, lambda key, image: image**2)
    np.testing.assert_array_equal(apply(key, IMAGE), noisy(key, IMAGE))
    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.sum(apply(key, x)))(IMAGE), 2 * IMAGE, rtol=1e-6
    )


def test_straight_through_chains(key):
    """The rule of a chain is the chain of the rules."""
    first = straight_through(jnp.round, lambda x: 2 * x)
    second = straight_through(jnp.floor, lambda x: x**3)
    gradient = jax.grad(lambda x: jnp.sum(second(first(x))))(IMAGE)
    np.testing.assert_allclose(gradient, 3 * jnp.round(IMAGE) ** 2 * 2, rtol=1e-6)


def test_straight_through_under_vmap_and_jit():
    rounded = straight_through(jnp.round)
    images = jnp.stack([IMAGE, 1 - IMAGE])
    gradient = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(rounded(x) ** 2))))(images)
    np.testing.assert_allclose(gradient, 2 * jnp.round(images), rtol=1e-6)
