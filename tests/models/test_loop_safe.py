"""Any function's convolutions are replaced by loop-safe ones: same values, same gradients."""

from functools import partial

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from rain_jax.models.conv import by_lax
from rain_jax.models.loop_safe import loop_safe

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
ONE = ((1, 1), (1, 1))
# Shapes of images and kernel, strides, padding, layout, and what else `lax` is given.
REPLACED = {
    "plain": ((2, 8, 8, 3), (3, 3, 3, 5), (1, 1), ONE, NHWC, {}),
    "channels first": ((2, 3, 8, 7), (5, 3, 3, 3), (1, 1), ONE, NCHW, {}),
    "mixed": ((8, 3, 2, 7), (3, 5, 2, 3), (2, 1), ONE, ("HCNW", "HOWI", "CWNH"), {}),
    "strided": ((2, 9, 8, 3), (3, 3, 3, 5), (2, 3), "SAME", NHWC, {}),
    "asymmetric": ((2, 8, 8, 3), (2, 3, 3, 5), (1, 2), ((0, 2), (3, -1)), NHWC, {}),
    "dilated": ((2, 8, 8, 3), (3, 3, 3, 5), (1, 1), ONE, NHWC, dict(rhs_dilation=(2, 1))),
    "transposed": ((2, 4, 5, 3), (3, 3, 3, 5), (1, 1), ONE, NHWC, dict(lhs_dilation=(2, 2))),
    "1-D": ((2, 9, 3), (3, 3, 5), (2,), ((1, 0),), ("NHC", "HIO", "NHC"), {}),
    "1-D channels first": ((2, 3, 9), (5, 3, 3), (1,), "VALID", ("NCH", "OIH", "NCH"), {}),
}  # fmt: skip
LEFT = {
    "3-D": ((2, 4, 5, 4, 3), (2, 3, 2, 3, 5), (1, 1, 2), "SAME", ("NDHWC", "DHWIO", "NDHWC"), {}),
    "grouped": ((2, 8, 8, 4), (3, 3, 2, 6), (1, 1), ONE, NHWC, dict(feature_group_count=2)),
    "of groups of images": ((4, 8, 8, 3), (3, 3, 3, 6), (1, 1), ONE, NHWC,
                            dict(batch_group_count=2)),
}  # fmt: skip
CASES = REPLACED | LEFT


def convolution(name):
    _, _, strides, padding, layout, others = CASES[name]
    return lambda x, k: lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=layout, **others
    )


def operands(name):
    draw = np.random.default_rng(5)
    return [draw.normal(size=shape).astype(np.float32) for shape in CASES[name][:2]]


def rules(function, *arguments):
    """How many derivative rules of this project's convolutions there are in a function."""
    return str(jax.make_jaxpr(function)(*arguments)).count("_convolve")


@pytest.fixture(scope="module")
def found():
    """Values and gradients of all cases, by `lax` and by ours, from one program."""

    def both(function, x, k):
        loss = lambda x, k: jnp.sum(jnp.sin(0.3 * function(x, k)))
        return function(x, k), jax.grad(loss, (0, 1))(x, k)

    @jax.jit
    def everything(arrays):
        by = {name: (convolution(name), loop_safe(convolution(name))) for name in CASES}
        return {name: [both(f, *arrays[name]) for f in by[name]] for name in CASES}

    return jax.device_get(everything({name: operands(name) for name in CASES}))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_lax(found, name):
    expected, ours = found[name]
    for theirs, mine in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, atol=2e-6 * np.max(np.abs(theirs)))


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_known_is_left_as_it_is(name):
    assert (rules(loop_safe(convolution(name)), *operands(name)) > 0) == (name in REPLACED)


def block(x, k):
    return jnp.tanh(convolution("plain")(x, k))


def scanned(x, k):
    rows = jnp.stack([k, 2 * k])
    total, seen = lax.scan(lambda c, row: (c + jnp.sum(block(x, row)), c), 0.0, rows, reverse=True)
    return total + jnp.sum(seen)


def repeated(x, k):
    """A loop of unknown length, which has no gradient: what it is taken of does not turn on it."""
    fixed = lax.stop_gradient(x)
    turns = lambda c: jnp.sum(block(fixed, k.at[0].set(0.0))) * 0 + c[0] < 3
    body = lambda c: (c[0] + 1, c[1] + jnp.sum(block(fixed, 0.5 * lax.stop_gradient(k))))
    return jnp.sum(x) + lax.stop_gradient(lax.while_loop(turns, body, (0, 0.0))[1])


NESTED = {
    "jit": jax.jit(block),
    "jit in jit": jax.jit(lambda x, k: 2 * jax.jit(block)(x, k)),
    "checkpoint": jax.checkpoint(block),
    "scan": scanned,
    "while": repeated,
    "cond": lambda x, k: lax.cond(jnp.sum(x) > 0, block, lambda x, k: block(x, 2 * k), x, k),
    "switch": lambda x, k: lax.switch(1, [lambda x, k: -block(x, k), block, block], x, k),
    "vmap": lambda x, k: jax.vmap(lambda image: block(image[None], k)[0])(x),
}


def test_convolutions_are_found_inside_of_other_programs():
    arrays = operands("plain")
    loss = lambda f: lambda x, k: jnp.sum(jnp.square(f(x, k)))

    @jax.jit
    def everything(x, k):
        both = lambda f: [jax.value_and_grad(loss(g), (0, 1))(x, k) for g in (f, loop_safe(f))]
        return {name: both(f) for name, f in NESTED.items()}

    for name, (expected, ours) in jax.device_get(everything(*arrays)).items():
        assert rules(loop_safe(NESTED[name]), *arrays) > 0, name
        for theirs, mine in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.max(np.abs(theirs)) + 1e-7)


def test_rules_for_derivatives_are_kept():
    """Those of `relu`, whose gradient at zero is zero, and those that a model brings."""

    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (straight(x), None), lambda _, g: (7 * g,))
    image, kernel = operands("plain")
    image[:, :4] = 0.0

    def model(x):
        return jnp.sum(straight(nn.relu(convolution("plain")(nn.relu(x), kernel))))

    slopes = jax.jit(lambda x: (jax.grad(loop_safe(model))(x), jax.grad(model)(x)))
    ours, theirs = slopes(image)
    assert np.all(ours[:, :4] == 0)
    assert np.any(ours != 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.max(np.abs(theirs)))


def test_what_has_a_rule_of_its_own_is_not_entered():
    @jax.custom_vjp
    def own(x, k):
        return convolution("plain")(x, k)

    own.defvjp(lambda x, k: (own(x, k), (x, k)), lambda kept, g: jax.tree.map(jnp.ones_like, kept))
    x, k = operands("plain")
    slope = jax.grad(
        lambda x: jnp.sum(loop_safe(own)(x, k) + loop_safe(convolution("plain"))(x, k))
    )
    assert rules(loop_safe(own), x, k) == 0
    plain = jax.grad(lambda x: jnp.sum(convolution("plain")(x, k)))
    ours, theirs = jax.jit(lambda x: (slope(x), plain(x) + 1))(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


class Plain(nn.Module):
    """As people write them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.max_pool(nn.remat(nn.Conv)(8, (3, 3))(x), (2, 2), strides=(2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_a_model_of_flax_climbed_in_a_loop_as_an_attack_does():
    module = Plain()
    images = np.random.default_rng(0).random((4, 8, 8, 2)).astype(np.float32)
    variables = drawn.variables(module.init, jax.random.key(0), images, seed=1)
    one = lambda variables, image: module.apply(variables, image[None])[0]

    def climbed(model, variables, image):
        slope = jax.grad(lambda image: model(variables, image)[1] - model(variables, image)[0])
        return lax.fori_loop(0, 4, lambda _, image: image + 0.05 * slope(image), image)

    @jax.jit
    def all_of(variables, images):
        each = lambda model: jax.vmap(partial(climbed, model, variables))(images)
        closed = lambda image: one(variables, image)  # over a traced value
        by_closure = jax.vmap(partial(climbed, lambda _, x: loop_safe(closed)(x), variables))
        return each(one), each(loop_safe(one)), by_closure(images)

    theirs, *ours = all_of(variables, images)
    assert np.max(np.abs(theirs - images)) > 0.01
    for mine in ours:
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_where_lax_is_asked_for_nothing_is_replaced():
    with by_lax():
        assert rules(loop_safe(convolution("plain")), *operands("plain")) == 0
