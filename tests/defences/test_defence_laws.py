"""Laws that every defence keeps. A new one is listed in MADE, or this file fails."""

import functools
from typing import NamedTuple

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import defences
from rain_jax.checks import UsageError
from rain_jax.models.upscalers import bicubic
from rain_jax.types import Defence

# Each defence as a config would name it, but for sizes that tests can afford.
MADE = {
    "bit_depth": defences.bit_depth,
    "chain": lambda: defences.chain((defences.median(), defences.gaussian_noise(scale=0.02))),
    "choose": lambda: defences.choose((defences.median(), defences.bit_depth())),
    "feature_distillation": defences.feature_distillation,
    "gaussian_noise": defences.gaussian_noise,
    "jpeg": defences.jpeg,
    "median": defences.median,
    "nn_jpeg": defences.nn_jpeg,
    "rain": lambda: defences.rain(upscaler=bicubic(), reach=0.3),
    "resize_and_pad": defences.resize_and_pad,
    "shield": defences.shield,
    "total_variation": lambda: defences.total_variation(steps=10),
}
# Noise is not clipped in front of a network that is smoothed (arXiv:1902.02918).
UNBOUNDED = {"chain", "gaussian_noise"}
COUNT, SHAPE = 4, (12, 9, 3)
DRAW = np.random.default_rng(6)
IMAGES = DRAW.random((COUNT, *SHAPE)).astype(np.float32)
KEYS = drawn.keys(5, 2, COUNT)  # two sets
OTHER_SHAPES = [(1, 1, 1), (9, 12, 1), (225, 225, 3)]


class Seen(NamedTuple):
    """What a defence makes of images, NumPy arrays by name of its forms, `apply` among them."""

    image: dict  # [N, H', W', C]
    again: dict  # by other keys
    alone: dict  # of the first image, with no batch around it
    gradient: dict  # of a weighted sum of the pixels, towards the image


def forms(defence):
    return {"apply": defence.apply, **defence.surrogates}


def seen(defence):
    def of(apply, keys, images, variables):
        def total(key, image):
            made = apply(variables, key, image)
            weights = jnp.cos(jnp.arange(made.size, dtype=jnp.float32)).reshape(made.shape)
            return jnp.sum(weights * made), made

        slope = jax.grad(total, 1, has_aux=True)
        gradient, image = jax.vmap(slope)(keys[0], images)
        again = jax.vmap(lambda key, image: total(key, image)[1])(keys[1], images)
        return image, again, total(keys[0, 0], images[0])[1], gradient

    @jax.jit
    def everything(keys, images):
        variables = defence.init(keys[0, 0], images[0])
        return {name: of(f, keys, images, variables) for name, f in forms(defence).items()}

    found = jax.device_get(everything(KEYS, IMAGES))
    return Seen(*({name: four[place] for name, four in found.items()} for place in range(4)))


def random(defence, name):
    return defence.random and name not in defence.fixed


def law_of_draws(defence, known):
    """A form draws if it says so, and no other does."""
    for name in forms(defence):
        same = np.array_equal(known.image[name], known.again[name])
        assert same != random(defence, name), name


def law_of_gradients(defence, known):
    """Every image has a gradient that an attacker can use: of `apply`, or of some surrogate."""
    for gradient in known.gradient.values():
        assert np.all(np.isfinite(gradient))
    lengths = [np.max(np.abs(g), axis=(1, 2, 3)) for g in known.gradient.values()]
    assert np.all(np.max(lengths, axis=0) > 0)


@functools.cache
def made(name):
    defence = MADE[name]()
    return defence, seen(defence)


@pytest.fixture(scope="module", params=defences.__all__)
def name(request):
    """Of the module, so that all laws of one defence come together, in one process."""
    return request.param


def test_every_defence_is_listed():
    assert sorted(MADE) == sorted(defences.__all__)


def test_it_draws_where_it_says_so_and_nowhere_else(name):
    law_of_draws(*made(name))


def test_an_attacker_has_a_gradient(name):
    law_of_gradients(*made(name))


def test_images_stay_images(name):
    _, known = made(name)
    for form, image in known.image.items():
        assert image.dtype == np.float32
        assert image.shape[3] == SHAPE[2], form
        assert np.all(np.isfinite(image))
        # A surrogate is a smooth stand-in, which may overshoot a little.
        low, high = (0.0, 1.0) if form == "apply" else (-0.5, 1.5)
        assert name in UNBOUNDED or (np.min(image) >= low and np.max(image) <= high), form


def test_an_image_does_not_feel_its_batch(name):
    defence, known = made(name)
    for form in forms(defence):
        # Rounding may tip a level over, of a pixel or of a coefficient of a block.
        apart = np.abs(known.image[form][0] - known.alone[form])
        assert np.mean(apart > 1e-5) < 0.1, form


def test_an_image_without_a_program_around_it_is_the_same(name):
    defence, known = made(name)
    variables = defence.init(KEYS[0, 0], IMAGES[0])
    eager = np.asarray(defence.apply(variables, KEYS[0, 0], jnp.asarray(IMAGES[0])))
    assert np.mean(np.abs(eager - known.image["apply"][0]) > 1e-5) < 0.1


def test_small_large_and_grey_images(name):
    defence = MADE[name]()
    images = [DRAW.random(shape).astype(np.float32) for shape in OTHER_SHAPES]

    def pair(image):
        variables = defence.init(KEYS[0, 0], image)
        total = lambda image: jnp.sum(defence.apply(variables, KEYS[0, 0], image))
        return defence.apply(variables, KEYS[0, 0], image), jax.grad(total)(image)

    def fits(image):
        try:
            jax.eval_shape(pair, image)
        except UsageError:
            return False
        return True

    fit = [image for image in images if fits(image)]
    assert len(fit) >= 2, "one pixel alone may be too few"
    found = jax.device_get(jax.jit(lambda some: [pair(image) for image in some])(fit))
    for image, (after, gradient) in zip(fit, found, strict=True):
        assert after.shape[2] == image.shape[2]
        assert np.all(np.isfinite(after))
        assert np.all(np.isfinite(gradient))


def test_the_laws_catch_a_defence_that_hides():
    """Noise that it does not declare, in front of a gradient that it stops."""

    def apply(variables, key, image):
        return jax.lax.stop_gradient(image) + 0.1 * jax.random.normal(key, image.shape)

    hiding = Defence(lambda key, image: {}, apply)
    known = seen(hiding)
    with pytest.raises(AssertionError):
        law_of_draws(hiding, known)
    with pytest.raises(AssertionError):
        law_of_gradients(hiding, known)
    law_of_draws(hiding._replace(random=True), known)
