"""Noise: Gaussian, of photons, of broken pixels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.image.corruptions.common import Constants, Table, at, colours, row, stored
from rain_jax.types import Image, Key

_DEVIATION: Table = {
    "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
    "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
}
# Photons of a white pixel.
_PHOTONS: Table = {"imagenet": (60, 25, 12, 5, 3), "cifar": (500, 250, 100, 75, 50)}
_LEVELS = 256
# Counts end at this many times the rate of white: of 60 photons, at 7.7 deviations more.
_MOST_OVER_MEAN = 2
_BROKEN: Table = {
    "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27),
    "cifar": (0.01, 0.02, 0.03, 0.05, 0.07),
}


def gaussian_noise(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """Adds independent normal noise to every value."""
    colours(image)
    deviation = at(_DEVIATION, severity, constants)
    return stored(image + deviation * jax.random.normal(key, image.shape))


def _counted(photons: float, size: int) -> np.ndarray:
    """The chance of at most k photons from a pixel of each of 256 levels, [256, size]."""
    rate = photons * np.arange(_LEVELS)[:, None] / (_LEVELS - 1)
    count = np.arange(size)
    log_factorial = np.cumsum(np.log(np.maximum(count, 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = np.exp(np.where(count, count * np.log(rate), 0.0) - rate - log_factorial)
    return np.minimum(np.cumsum(chance, axis=1), 1.0)


def shot_noise(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """Counts photons: Poisson noise on the image in 256 levels. The gradient is none.

    A count is looked up for a uniform number in a table for all levels, by bisection: many times
    faster than by rejection. Counts of a chance below 2^-23 do not occur.
    """
    colours(image)
    photons = at(_PHOTONS, severity, constants)
    bits = (int(max(_PHOTONS[constants]) * _MOST_OVER_MEAN) - 1).bit_length()
    size = 2**bits
    tables = np.stack([_counted(each, size) for each in _PHOTONS[constants]]).astype(np.float32)
    table = row(tables.reshape(len(tables), -1), severity)
    draw = jax.random.uniform(key, image.shape)
    first = size * jnp.floor((_LEVELS - 1) * jnp.clip(image, 0.0, 1.0) + 0.5).astype(jnp.int32)
    count = jnp.zeros_like(first)
    for bit in reversed(range(bits)):
        count += jnp.where(table[first + count + 2**bit - 1] <= draw, 2**bit, 0)
    return stored(jnp.where(jnp.isnan(image), jnp.nan, count.astype(jnp.float32) / photons))


def impulse_noise(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """Salt and pepper: some values become 0 or 1, each with half the chance, channels apart."""
    colours(image)
    broken = at(_BROKEN, severity, constants)
    draw = jax.random.uniform(key, image.shape)
    return stored(jnp.where(draw < broken / 2, 0.0, jnp.where(draw < broken, 1.0, image)))
