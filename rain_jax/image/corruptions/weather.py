"""Weather: snow, frost, fog, glaring light."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError
from rain_jax.image.corruptions.common import (
    Constants,
    Table,
    at,
    colours,
    enlarged_places,
    moved,
    rounded,
    row,
    stored,
    stretched,
)
from rain_jax.image.jpeg import luminance
from rain_jax.types import Array, Image, Key

# Mean and deviation of the flakes' layer, its enlargement, its threshold; radius and deviation of
# their fall; how much of the image keeps its colours.
_SNOW: Table = {
    "imagenet": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "cifar": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
}
_ENLARGEMENT, _RADIUS = 2, 4  # places in a row
_FALL = (-135.0, -45.0)  # degrees
# What snow makes of a colour: its grey, brighter by half, and half of white on top.
_BLEACH = (1.5, 0.5)
# Weights of the image and of the photograph of frost.
_FROST: Table = {
    "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
}
# Of the photographs every so many pixels are taken: the authors' resizing by 0.2 falls on every
# fifth of them, from the third.
_FROST_STRIDE = {"imagenet": (0, 1), "cifar": (2, 5)}
# Thickness, and by what the roughness shrinks from one scale to the next.
_FOG: Table = {
    "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
}
_ROUGHNESS = 100.0
_LIGHT: Table = {"imagenet": (0.1, 0.2, 0.3, 0.4, 0.5), "cifar": (0.05, 0.1, 0.15, 0.2, 0.3)}


def snow(key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet") -> Image:
    """Bleaches the image and lets flakes fall: enlarged noise above a threshold, blurred by motion.

    The layer of flakes is added twice, once turned by half a turn.
    """
    colours(image)
    mean, deviation, _, threshold, radius, sigma, kept = at(_SNOW, severity, constants)
    noise_key, fall_key = jax.random.split(key)
    table = _SNOW[constants]
    y, x = (
        row(
            np.array([enlarged_places(n, line[_ENLARGEMENT]) for line in table], np.float32),
            severity,
        )
        for n in image.shape[:2]
    )
    noise = jax.random.normal(noise_key, (*image.shape[:2], 1))
    flakes = stretched(mean + deviation * noise, y, x)
    flakes = stored(jnp.where(flakes < threshold, 0.0, flakes))
    angle = jax.random.uniform(fall_key, minval=_FALL[0], maxval=_FALL[1])
    reach = 2 * max(line[_RADIUS] for line in table)
    flakes = rounded(moved(flakes, angle, radius, sigma, reach=reach))
    more, white = _BLEACH
    bleached = jnp.maximum(image, more * luminance(image)[:, :, None] + white)
    return stored(kept * image + (1 - kept) * bleached + flakes + flakes[::-1, ::-1])


class Frost(NamedTuple):
    """Photographs of frost of several sizes on one canvas: see `frosted`."""

    pixels: Any  # [N, h, w, 3] in [0, 1]
    sizes: Any  # [N, 2] int32: the heights and widths of what is no canvas


def frosted(photographs: Sequence[np.ndarray], *, constants: Constants = "imagenet") -> Frost:
    """Photographs [h, w, 3], bytes or floats in [0, 1], as `frost` takes them, on the host.

    For "cifar" they are made smaller by 5. The authors' code has six and draws among the first five
    of them alone. Raises `UsageError` for none, and for other shapes.
    """
    if not len(photographs):
        raise UsageError("photographs: expected one of frost at least")
    first, stride = _FROST_STRIDE[constants]
    images = []
    for one in map(np.asarray, photographs):
        if one.ndim != 3 or one.shape[2] != 3:
            raise UsageError(f"photograph {list(one.shape)}: expected [h, w, 3]")
        pixels = one / np.float32(255) if one.dtype == np.uint8 else one.astype(np.float32)
        images.append(pixels[first::stride, first::stride])
    sizes = np.array([one.shape[:2] for one in images], np.int32)
    canvas = np.zeros((len(images), *sizes.max(axis=0), 3), np.float32)
    for place, one in zip(canvas, images, strict=True):
        place[: one.shape[0], : one.shape[1]] = one
    return Frost(canvas, sizes)


def frost(
    key: Key, image: Image, severity: Any, *, photographs: Frost, constants: Constants = "imagenet"
) -> Image:
    """Adds a random part of a random photograph of frost.

    `photographs` are those of `frosted` with the same constants: the authors' own lie beside their
    code, and are none of ours. Raises `UsageError` where one is not larger than the image.
    """
    channels = colours(image)
    height, width, _ = image.shape
    own, other = at(_FROST, severity, constants)
    canvas = np.shape(photographs.pixels)
    if not isinstance(photographs.sizes, jax.core.Tracer):
        smallest = np.min(np.asarray(photographs.sizes), axis=0).tolist()
        if smallest[0] <= height or smallest[1] <= width:
            raise UsageError(
                f"photographs of {smallest[0]} x {smallest[1]} pixels: expected larger ones than "
                f"the image, {height} x {width}"
            )
    which_key, corner_key = jax.random.split(key)
    which = jax.random.randint(which_key, (), 0, canvas[0])
    room = jnp.asarray(photographs.sizes)[which] - jnp.array([height, width])
    top, left = jax.random.randint(corner_key, (2,), 0, room)
    ice = jax.lax.dynamic_slice(
        jnp.asarray(photographs.pixels), (which, top, left, 0), (1, height, width, 3)
    )[0]
    return stored(own * image + other * (ice if channels == 3 else luminance(ice)[:, :, None]))


def plasma(draws: Sequence[Array], decay: Any) -> Array:
    """Diamond-square noise in [0, 1] on a torus, [2^n, 2^n], from `draws` [3, 2^k, 2^k] in [-1, 1].

    Their roughness is 100^2 at first and smaller by decay^2 at every scale. Points in the middle of
    four corners come first, then those between two corners and two middles.
    """
    corners = jnp.zeros((1, 1))
    for scale, (to_middle, to_top, to_left) in enumerate(draws):
        reach = (_ROUGHNESS / decay**scale) ** 2
        beside, below = (corners + jnp.roll(corners, -1, axis=axis) for axis in (1, 0))
        middle = (beside + jnp.roll(beside, -1, axis=0)) / 4 + reach * to_middle
        top = (middle + jnp.roll(middle, 1, axis=0) + beside) / 4 + reach * to_top
        left = (middle + jnp.roll(middle, 1, axis=1) + below) / 4 + reach * to_left
        upper, lower = jnp.stack([corners, top], axis=-1), jnp.stack([left, middle], axis=-1)
        side = 2 * len(corners)
        corners = jnp.stack([upper, lower], axis=1).reshape(side, side)
    least = jnp.min(corners)
    return (corners - least) / (jnp.max(corners) - least)


def fog(key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet") -> Image:
    """Adds diamond-square clouds, and darkens so that the brightest value stays in range."""
    colours(image)
    height, width, _ = image.shape
    thickness, decay = at(_FOG, severity, constants)
    scales = (max(height, width, 2) - 1).bit_length()
    # One call for all scales, which together have all points but the first corner.
    parts = jnp.split(
        jax.random.uniform(key, (4**scales - 1,), minval=-1.0),
        [4**scale - 1 for scale in range(1, scales)],
    )
    draws = [part.reshape(3, 2**scale, 2**scale) for scale, part in enumerate(parts)]
    clouds = plasma(draws, decay)[:height, :width, None]
    brightest = jnp.max(image)
    return stored((image + thickness * clouds) * (brightest / (brightest + thickness)))


def brightness(
    key: Key, image: Image, severity: Any, *, constants: Constants = "imagenet"
) -> Image:
    """Raises the value of HSV and keeps hue and saturation. Draws nothing."""
    colours(image)
    light = at(_LIGHT, severity, constants)
    value = jnp.max(image, axis=-1, keepdims=True)
    raised = jnp.minimum(value + light, 1.0)
    # Black has no hue: it turns grey.
    lit = image * raised / jnp.where(value > 0, value, 1.0)
    return stored(jnp.where(value > 0, lit, raised))
