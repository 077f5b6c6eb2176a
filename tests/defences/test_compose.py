"""What `chain`, `choose`, `bpda`, `defend` and `mean_of_draws` promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax.checks import UsageError
from rain_jax.defences.compose import bpda, chain, choose, defend, form, mean_of_draws
from rain_jax.gradients import straight_through
from rain_jax.types import Defence

IMAGE = jax.random.uniform(jax.random.key(3), (4, 4, 1))
KEY = jax.random.key(0)


def scale(factor, **more):
    """Multiplies by a parameter."""
    return Defence(
        lambda key, image: {"params": jnp.float32(factor)},
        lambda variables, key, image: variables["params"] * image,
        **more,
    )


def noise():
    """Adds noise whose size is a fixed variable."""
    return Defence(
        lambda key, image: {"fixed": jnp.float32(0.1)},
        lambda variables, key, image: (
            image + variables["fixed"] * jax.random.normal(key, image.shape)
        ),
        random=True,
    )


def halve():
    """Keeps every second row."""
    return Defence(lambda key, image: {}, lambda variables, key, image: image[::2])


def steps():
    """Rounds, with no slope of its own; `soft` has another one."""
    hard = lambda variables, key, image: jnp.round(4 * image) / 4
    return Defence(
        lambda key, image: {},
        straight_through(hard),
        surrogates={"soft": lambda variables, key, image: 3.0 * image},
    )


def total(key, image):
    return jnp.sum(image) * jnp.ones(2)


def test_a_chain_goes_in_order_with_each_members_own_variables():
    both = chain((scale(2.0), halve(), scale(0.5)))
    variables = both.init(KEY, IMAGE)
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"0", "2"}
    variables["params"]["2"] = jnp.float32(5.0)
    np.testing.assert_allclose(both.apply(variables, KEY, IMAGE), 10 * IMAGE[::2], rtol=1e-6)
    assert not both.random
    assert chain((scale(1.0), noise())).random


def test_the_next_members_variables_are_of_the_image_that_it_gets():
    seen = Defence(
        lambda key, image: {"params": jnp.zeros(image.shape)},
        lambda variables, key, image: image + variables["params"],
    )
    assert chain((halve(), seen)).init(KEY, IMAGE)["params"]["1"].shape == (2, 4, 1)


def test_gradients_go_through_all_of_a_chain():
    both = chain((scale(2.0), steps(), scale(3.0)))
    variables = both.init(KEY, IMAGE)
    slope = lambda apply: jax.grad(lambda x: jnp.sum(apply(variables, KEY, x)))(IMAGE)
    np.testing.assert_allclose(slope(both.apply), 6.0, rtol=1e-6)
    # The others stay as they are deployed.
    np.testing.assert_allclose(slope(both.surrogates["soft"]), 18.0, rtol=1e-6)
    np.testing.assert_allclose(
        both.apply(variables, KEY, IMAGE), 3 * jnp.round(8 * IMAGE) / 4, rtol=1e-6
    )


def test_members_of_a_chain_draw_apart():
    both = chain((noise(), noise()))
    variables = both.init(KEY, IMAGE)
    first = chain((noise(), scale(1.0)))
    alone = first.apply(first.init(KEY, IMAGE), KEY, IMAGE) - IMAGE
    second = both.apply(variables, KEY, IMAGE) - IMAGE - alone
    assert float(jnp.max(jnp.abs(second - alone))) > 1e-3


def test_a_choice_is_drawn_with_its_weights():
    either = choose((scale(0.0), scale(1.0)), weights=(1.0, 3.0))
    assert either.random
    variables = either.init(KEY, IMAGE)
    keys = jax.random.split(KEY, 2000)
    drawn = jax.vmap(lambda key: either.apply(variables, key, IMAGE))(keys)
    kept = np.all(np.asarray(drawn) == np.asarray(IMAGE), axis=(1, 2, 3))
    gone = np.all(np.asarray(drawn) == 0, axis=(1, 2, 3))
    assert np.all(kept | gone)
    assert abs(np.mean(kept) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000)
    never = choose((scale(0.0), scale(1.0)), weights=(0.0, 1.0))
    np.testing.assert_array_equal(never.apply(variables, KEY, IMAGE), IMAGE)


def test_the_drawn_members_gradient_is_the_choices():
    either = choose((scale(2.0), steps()))
    variables = either.init(KEY, IMAGE)
    for key in jax.random.split(KEY, 5):
        slope = jax.grad(lambda x, k=key: jnp.sum(either.apply(variables, k, x)))(IMAGE)
        value = either.apply(variables, key, IMAGE)
        scaled = bool(jnp.all(value == 2 * IMAGE))
        np.testing.assert_allclose(slope, 2.0 if scaled else 1.0)


def test_bpda_keeps_the_function_and_changes_its_slope():
    zero = Defence(lambda key, image: {}, lambda variables, key, image: jnp.round(image))
    ours = bpda(zero)
    np.testing.assert_array_equal(ours.apply({}, KEY, IMAGE), jnp.round(IMAGE))
    slope = lambda apply: jax.grad(lambda x: jnp.sum(x * apply({}, KEY, x)))(IMAGE)
    np.testing.assert_allclose(slope(ours.apply), jnp.round(IMAGE) + IMAGE, rtol=1e-6)
    np.testing.assert_allclose(slope(ours.surrogates["own"]), jnp.round(IMAGE), rtol=1e-6)
    steep = bpda(zero, lambda variables, key, image: 7 * image)
    np.testing.assert_allclose(slope(steep.apply), jnp.round(IMAGE) + 7 * IMAGE, rtol=1e-5)


def test_a_defended_model_sees_the_defended_image_and_draws_apart():
    logits_fn = defend(total, scale(2.0), {"params": jnp.float32(2.0)})
    np.testing.assert_allclose(logits_fn(KEY, IMAGE), 2 * total(KEY, IMAGE), rtol=1e-6)
    through = defend(total, steps(), {}, through="soft")
    np.testing.assert_allclose(through(KEY, IMAGE), 3 * total(KEY, IMAGE), rtol=1e-6)

    # The model's draw is none of the defence's.
    drawing = lambda key, image: jnp.concatenate([jax.random.normal(key, (1,)), image[0, 0]])
    logits = defend(drawing, noise(), {"fixed": jnp.float32(1.0)})(KEY, jnp.zeros((1, 1, 1)))
    assert float(jnp.abs(logits[0] - logits[1])) > 1e-3


def test_a_model_deployed_as_a_mean_of_draws():
    noisy = defend(total, noise(), {"fixed": jnp.float32(1.0)})
    keys = jax.random.split(KEY, 8)
    expected = jnp.mean(jax.vmap(lambda key: noisy(key, IMAGE))(keys), axis=0)
    np.testing.assert_allclose(mean_of_draws(noisy, 8)(KEY, IMAGE), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: chain(()), "one at least"),
        (lambda: choose(()), "one at least"),
        (lambda: choose((scale(1.0), noise()), weights=(1.0,)), "expected 2 numbers"),
        (lambda: choose((scale(1.0),), weights=(-1.0,)), "weights="),
        (lambda: choose((scale(1.0),), weights=(0.0,)), "expected 1 numbers, not all zero"),
        (lambda: choose((scale(1.0), noise()), weights=("a", "b")), "weights=.*expected a number"),
        (lambda: choose((scale(1.0), noise()), weights=((1, 2), 3)), "weights=.*expected a number"),
        (lambda: choose((scale(1.0), noise()), weights=(2.0, -1.0)), "weights="),
        (lambda: form(steps(), "sfot"), "did you mean 'soft'"),
        (lambda: form(noise(), "soft"), "no surrogates"),
        (lambda: mean_of_draws(total, 0), "draws=0"),
    ],
)
def test_mistakes_are_told(make, says):
    with pytest.raises(UsageError, match=says):
        make()
